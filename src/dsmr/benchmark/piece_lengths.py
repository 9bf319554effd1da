"""What a piece takes, the longer it is: time in a straight line, memory on a level."""

import time
from collections.abc import Callable
from typing import Any

import torch

from dsmr.benchmark.settings import Workload
from dsmr.benchmark.variants import Row
from dsmr.cost.measuring import GIB, peak_rss_gib
from dsmr.model.memory import MIB


@torch.inference_mode()
def piece_curve(name: str, work: Workload, row: Row, lengths: list[int], say: Callable[[str], None]) -> dict[str, Any]:
    """Read one piece from its beginning, and note time and memory after so many tokens.

    Returns:
        `{name, points}`; a point has tokens, seconds so far, MiB of state, and the peak in GiB: on CUDA what torch had
        allocated, on a CPU the resident size of the whole process, which other rows have part in.
    """
    network = work.network(row, work.form).eval()
    tokens, points, read, seconds = work.tokens(), [], 0, 0.0
    with work.autocast():
        memory = network.init_memory(1)
        network(tokens.draw(1, network.segment_length), memory)  # warm-up
        if work.place.type == "cuda":
            torch.cuda.reset_peak_memory_stats(work.place)
        for length in sorted(lengths):
            say(f"{name}: a piece of {length:,} tokens")
            began = time.perf_counter()
            while read < length:
                _, update = network(tokens.draw(1, network.segment_length), memory)
                memory.commit(update)
                read += network.segment_length
            if work.place.type == "cuda":
                torch.cuda.synchronize(work.place)
            seconds += time.perf_counter() - began
            point = {"tokens": read, "seconds": seconds, "state_mib": memory.num_bytes / MIB}
            points.append(point | peak(work.place))
    return {"name": name, "points": points}


def peak(place: torch.device) -> dict[str, float]:
    """The peak so far, named for what it is."""
    if place.type == "cuda":
        return {"peak_memory_gib": torch.cuda.max_memory_allocated(place) / GIB}
    return peak_rss_gib()
