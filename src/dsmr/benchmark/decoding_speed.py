"""Decoding rows: one token at a time, after a context as long as each network keeps."""

import torch

from dsmr.benchmark.settings import Workload
from dsmr.benchmark.training_speed import MeasuredRow, x_transformers_network
from dsmr.benchmark.variants import Row
from dsmr.cost import MIB
from dsmr.model.memory import open_bytes


def decoding_row(name: str, work: Workload, row: Row, num_lanes: int, bandwidth: float) -> MeasuredRow:
    """Prepare a decoding row of one of our networks.

    Its floor is the time to read weights, rings and open segment once per token at the measured bandwidth.
    """
    network = work.network(row, work.backend, is_compiled=False).eval()  # a growing past would recompile each step
    memory = work.full_memory(network, num_lanes, decoding=True)
    token_B1 = work.tokens().draw(num_lanes, 1)
    count = work.settings.decode_tokens

    @torch.inference_mode()
    def run_steps(steps: int) -> None:
        memory.open_length = 0
        for _ in range(count * steps):
            with work.autocast():
                _, update = network(token_B1, memory)
            memory.commit(update)

    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    sizes = {"num_lanes": num_lanes, "kv_width": network.settings.kv_width, "itemsize": memory.dtype.itemsize}
    capacity = open_bytes(len(network.blocks), segment_length=network.segment_length, **sizes)
    # the open segment grows from empty over the decoded tokens: on average half of them are read
    mean_open = capacity * work.settings.steps * count / 2 / network.segment_length
    rings = memory.num_bytes - capacity
    facts = {
        "precision": work.precision,
        "lanes": num_lanes,
        "state_mib": memory.num_bytes / MIB,
        "floor_tokens_per_second": num_lanes * bandwidth / (weights + rings + mean_open),
    }
    return MeasuredRow(name, "decoding", num_lanes * count, run_steps, facts)


def x_transformers_decoding_row(name: str, work: Workload) -> MeasuredRow:
    """Prepare a decoding row of x-transformers with its cache, at a context of the full horizon."""
    network = x_transformers_network(work).eval()
    with torch.inference_mode(), work.autocast():
        cache = network.begin_decoding(work.tokens().draw(1, work.prefix_length))
    token_B1 = work.tokens().draw(1, 1)
    count = max(work.settings.decode_tokens // 4, 1)

    @torch.inference_mode()
    def run_steps(steps: int) -> None:
        for _ in range(count * steps):
            with work.autocast():
                network.decode(token_B1, cache)

    return MeasuredRow(name, "decoding", count, run_steps, {"precision": work.precision, "lanes": 1})
