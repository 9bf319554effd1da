"""Measure speed and memory of generation by a trained model, on the GPU if there is one.

    python experiments/gpu/music.py RUN [--tokens 20000] [--seconds 30]

For 1 and 8 pieces at once: tokens per second and allocated memory after every thousand tokens; memory should stay
constant. Prints JSON. The music itself is not checked here.
"""

import argparse
import json
import os
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dsmr.cost import MIB
from dsmr.generate import Generator

STRETCH = 1000


def allocated_mib() -> float:
    """Return the GPU memory allocated by tensors; on a CPU the resident size of this process (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / MIB
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def measure_generation(made: Generator, lanes: int, tokens: int, seconds: float) -> dict[str, Any]:
    """Measure speed and memory over `tokens` tokens in each lane, or as many as `seconds` allow."""
    stretch = min(STRETCH, tokens)
    steps = made.tokens(num=lanes, may_end=False)
    next(steps)
    found: dict[str, Any] = {"tokens": [], "tokens_per_second": [], "allocated_mib": []}
    ends = time.monotonic() + seconds
    for done in range(stretch, tokens + 1, stretch):
        began = time.perf_counter()
        for _ in islice(steps, stretch):
            pass
        found["tokens"].append(done)
        found["tokens_per_second"].append(lanes * stretch / (time.perf_counter() - began))
        found["allocated_mib"].append(allocated_mib())
        if time.monotonic() > ends:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens of each piece")
    parser.add_argument("--seconds", type=float, default=30.0, help="time limit for each number of pieces")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = Generator.load(options.run, device=device)
    rows = {str(lanes): measure_generation(made, lanes, options.tokens, options.seconds) for lanes in (1, 8)}
    print(json.dumps({"device": device, "lanes": rows}))


if __name__ == "__main__":
    main()
