"""Compare `dsmr estimate` with measurements: bytes of the state, and bytes that autograd keeps for backward.

    python experiments/estimate/run.py [--output FILE.json]

Measures one row for each network, attention backend and precision on a CPU, and prints Markdown. Exits with 1 if a
state is not exact, or saved bytes are off by more than 10 %.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from dsmr.attention.backends import Backend
from dsmr.benchmark.machine import current_commit, package_versions
from dsmr.benchmark.settings import BenchmarkSettings, Workload
from dsmr.benchmark.training_speed import measure_saved_bytes, network_step
from dsmr.benchmark.variants import Row, build_network
from dsmr.cost import MIB
from dsmr.cost.operations import saved_bytes as predicted
from dsmr.model import RecurrentTransformer

BOUND = 0.10
SIZES = {
    "d256 L8 T512 B2": ({"d_model": 256, "num_layers": 8, "num_heads": 4, "segment_length": 512}, 2, 4096),
    "d512 L12 T512 B1": ({"d_model": 512, "num_layers": 12, "num_heads": 8, "segment_length": 512}, 1, 4096),
    "d128 L4 T256 B8": ({"d_model": 128, "num_layers": 4, "num_heads": 4, "segment_length": 256}, 8, 1024),
    "d256 L4 T256 B4, 2 key heads": (
        {"d_model": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "segment_length": 256},
        4,
        1024,
    ),
}


def horizons_of(num_layers: int, long: int, segment_length: int) -> dict[str, Row]:
    half = num_layers // 2
    return {
        "full": Row((long,) * num_layers),
        "two_scale": Row((long,) * 2 + (segment_length,) * (num_layers - 2)),
        "binary": Row((long,) * half + (0,) * (num_layers - half)),
        "perceiver_ar": Row(None),
    }


def compare(size: str, name: str, form: Backend, precision: str, dropout: float) -> dict[str, Any]:
    arguments, lanes, long = SIZES[size]
    given: dict[str, Any] = dict(arguments)
    length = given.pop("segment_length")
    row = horizons_of(given["num_layers"], long, length)[name]
    like = RecurrentTransformer(392, f"{given['num_layers']}x{length}", length, dropout=dropout, **given)
    work = DropoutWorkload(BenchmarkSettings(prefix_length=long), like, lanes, torch.device("cpu"), precision)
    step = network_step(work, row, form)
    state = sum(t.numel() * t.element_size() for t in step.state()) - 8 * lanes  # lanes' counters
    network = work.network(row, form)
    itemsize = work.dtype.itemsize
    measured, estimated = measure_saved_bytes(step), predicted(network, lanes, form, itemsize, on_cpu=True)
    return {
        "size": size,
        "row": name,
        "attention": form,
        "precision": precision,
        "dropout": dropout,
        "state_mib": state / MIB,
        "estimated_state_mib": network.state_bytes(lanes, itemsize) / MIB,
        "saved_mib": measured / MIB,
        "estimated_saved_mib": estimated / MIB,
    }


class DropoutWorkload(Workload):
    """A workload with the network's own dropout, which the benchmark leaves out."""

    def network(self, row: Row, form: Backend) -> Any:  # noqa: D102
        return build_network(row, self.like, prefix_length=self.prefix_length, attention=form)


def cases() -> list[tuple[str, str, Backend, str, float]]:
    first, base, laptop, grouped = SIZES
    found: list[tuple[str, str, Backend, str, float]] = []
    for name in ("full", "two_scale", "binary", "perceiver_ar"):
        found.append((first, name, "merged", "32-true", 0.0))
    found += [(first, "two_scale", "merged", "32-true", 0.1), (first, "two_scale", "merged", "bf16-mixed", 0.0)]
    for form in ("reference", "materialised"):
        found += [(first, "full", form, "32-true", 0.0), (first, "two_scale", form, "32-true", 0.0)]
    found += [(base, "two_scale", "merged", "32-true", 0.1), (laptop, "two_scale", "merged", "32-true", 0.1)]
    found += [(grouped, "two_scale", "merged", "32-true", 0.0), (grouped, "two_scale", "reference", "32-true", 0.0)]
    found += [(laptop, "two_scale", "merged", "bf16-mixed", 0.0), (laptop, "perceiver_ar", "merged", "32-true", 0.1)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    print("| size | row | attention | precision | dropout | state MiB | estimated | saved MiB | estimated | off by |")
    print("|---" * 10 + "|")
    rows, good = [], True
    for case in cases():
        row = compare(*case)
        rows.append(row)
        off = row["estimated_saved_mib"] / row["saved_mib"] - 1
        good &= abs(off) <= BOUND and row["state_mib"] == row["estimated_state_mib"]
        print(
            f"| {row['size']} | `{row['row']}` | {row['attention']} | {row['precision']} | {row['dropout']:g} "
            f"| {row['state_mib']:.3f} | {row['estimated_state_mib']:.3f} | {row['saved_mib']:.1f} "
            f"| {row['estimated_saved_mib']:.1f} | {off:+.1%} |",
            flush=True,
        )
    if options.output:
        document = {"commit": current_commit(), "versions": package_versions(), "rows": rows}
        options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
