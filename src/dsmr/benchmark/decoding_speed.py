"""Rows of decoding: token by token, after a context as long as each network keeps."""

import torch

from dsmr.benchmark.settings import Workload
from dsmr.benchmark.training_speed import Contestant, x_transformers_network
from dsmr.benchmark.variants import Row
from dsmr.cost import MIB
from dsmr.model.memory import open_bytes


def our_decoding(name: str, work: Workload, row: Row, num_lanes: int, bandwidth: float) -> Contestant:
    """A row of one of our networks.

    Its floor: weights, rings and open segment, read once per token at the measured bandwidth.
    """
    network = work.network(row, work.form, is_compiled=False).eval()  # a past that grows would be compiled anew
    memory = work.filled(network, num_lanes, decoding=True)
    token_B1 = work.tokens().draw(num_lanes, 1)
    count = work.settings.decode_tokens

    @torch.inference_mode()
    def turn(steps: int) -> None:
        memory.open_length = 0
        for _ in range(count * steps):
            with work.autocast():
                _, update = network(token_B1, memory)
            memory.commit(update)

    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    sizes = {"num_lanes": num_lanes, "kv_width": network.settings.kv_width, "itemsize": memory.dtype.itemsize}
    room = open_bytes(len(network.blocks), segment_length=network.segment_length, **sizes)
    opened = room * work.settings.steps * count / 2 / network.segment_length
    kept = memory.num_bytes - room
    facts = {
        "precision": work.precision,
        "lanes": num_lanes,
        "state_mib": memory.num_bytes / MIB,
        "floor_tokens_per_second": num_lanes * bandwidth / (weights + kept + opened),
    }
    return Contestant(name, "decoding", num_lanes * count, turn, facts)


def x_transformers_decoding(name: str, work: Workload) -> Contestant:
    """A row of x-transformers' decoding with its cache, at a context of the full horizon."""
    network = x_transformers_network(work).eval()
    with torch.inference_mode(), work.autocast():
        cache = network.begin_decoding(work.tokens().draw(1, work.prefix_length))
    token_B1 = work.tokens().draw(1, 1)
    tokens = max(work.settings.decode_tokens // 4, 1)

    @torch.inference_mode()
    def turn(steps: int) -> None:
        for _ in range(tokens * steps):
            with work.autocast():
                network.decode(token_B1, cache)

    return Contestant(name, "decoding", tokens, turn, {"precision": work.precision, "lanes": 1})
