"""Time and memory vs. piece length: linear time, constant memory."""

from collections.abc import Callable
from typing import Any

import torch

from dsmr.benchmark.settings import Workload
from dsmr.benchmark.variants import Row
from dsmr.cost import MIB
from dsmr.cost.measuring import peak_memory, reset_peak_memory, timed


@torch.inference_mode()
def measure_piece_lengths(
    name: str, work: Workload, row: Row, lengths: list[int], say: Callable[[str], None]
) -> dict[str, Any]:
    """Read one piece from its start, recording time and memory at the given lengths in tokens.

    Each of the `points` has tokens, seconds so far, MiB of state, and the peak in GiB as of `peak_memory` (on a CPU
    that of the whole process, other rows included).
    """
    network = work.network(row, work.backend).eval()
    tokens, points, num_read, total = work.tokens(), [], 0, 0.0
    with work.autocast():
        memory = network.init_memory(1)
        network(tokens.draw(1, network.segment_length), memory)  # warm-up
        reset_peak_memory(work.device)
        for length in sorted(lengths):
            say(f"{name}: a piece of {length:,} tokens")
            with timed(work.device) as seconds:
                while num_read < length:
                    _, update = network(tokens.draw(1, network.segment_length), memory)
                    memory.commit(update)
                    num_read += network.segment_length
            total += seconds[0]
            point = {"tokens": num_read, "seconds": total, "state_mib": memory.num_bytes / MIB}
            points.append(point | peak_memory(work.device))
    return {"name": name, "points": points}
