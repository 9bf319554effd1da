"""Measure how fast the training loader reads batches (needs a prepared store, DSMR_MAESTRO).

    python experiments/loader_speed/run.py --config base

Takes the data of a config and prints one JSON line: tokens per second in this process and with two workers, median of
five rounds of 2,000 batches.
"""

import json
import statistics
import sys
import time
from itertools import islice

from dsmr.cli.prepare_command import PrepareCLI

ROUNDS, BATCHES = 5, 2000


def main() -> int:
    found = {}
    for workers in (0, 2):
        data = PrepareCLI("prepare", [*sys.argv[1:], f"--data.num_workers={workers}"]).datamodule
        data.prepare_data()
        data.setup("fit")
        speeds = []
        for _ in range(ROUNDS):
            data.seek(0)
            batches = iter(data.train_dataloader())
            next(batches)
            began = time.perf_counter()
            count = sum(1 for _ in islice(batches, BATCHES))
            speeds.append(count * data.num_lanes * data.segment_length / (time.perf_counter() - began))
            del batches
        found[f"tokens_per_second_{workers}_workers"] = round(statistics.median(speeds))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
