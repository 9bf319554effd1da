"""What memory is for, in minutes on a CPU, on pieces that are generated here.

Two models of equal size are trained on pieces that ask, after a long silence, for what was heard long ago: one has a
two-scale memory, the other none. Both are validated, the two-scale one also with its memory taken away. The table
shows the perplexity of the answers by distance: 1 is perfect recall, 16 is chance. At the end, the two-scale
model writes a piece of MIDI.

    python experiments/demo/run.py [--root runs]
"""

import argparse
import json
import sys
import time
from datetime import datetime
from pathlib import Path

from dsmr.cli import main as dsmr
from dsmr.data.synthetic import NUM_MARKS, RecallTask

CONFIG = ["--config", "recall"]
REACH = 512
"""Tokens of the two-scale model's long horizon, `recall.yaml`'s 1x512+1x64."""


def run(arguments: list[str]) -> None:
    print(f"\n$ dsmr {' '.join(arguments)}", flush=True)
    status = dsmr(arguments)
    if status:
        sys.exit(status)


def recall(result: Path) -> dict[int, float]:
    """Perplexity by distance in tokens, from a result file of `dsmr validate`."""
    metrics = json.loads(result.read_text(encoding="utf-8"))["metrics"]
    prefix = "val/recall/perplexity_"
    return {int(name.removeprefix(prefix)): value for name, value in metrics.items() if name.startswith(prefix)}


def table(columns: dict[str, dict[int, float]]) -> str:
    names = list(columns)
    lines = [f"{'distance':>9}" + "".join(f"{name:>26}" for name in names)]
    for distance in sorted(RecallTask().distances):
        mark = " " if distance <= REACH else "*"
        lines.append(f"{distance:>8}{mark}" + "".join(f"{columns[name][distance]:>26.2f}" for name in names))
    return "\n".join([*lines, f"  * beyond the long horizon of {REACH} tokens"])


def verdict(columns: dict[str, dict[int, float]]) -> bool:
    """Print what the demo claims and whether it came out."""
    with_memory, without, emptied = columns.values()
    worst = max(value for distance, value in with_memory.items() if distance <= REACH)
    chance = 0.8 * NUM_MARKS
    claims = {
        f"two-scale recalls within its reach (worst {worst:.3f}, at most 1.1)": worst <= 1.1,
        f"memoryless is at chance (best {min(without.values()):.1f}, at least {chance:.1f})": min(without.values())
        >= chance,
        f"so is two-scale without its memory (best {min(emptied.values()):.1f})": min(emptied.values()) >= chance,
    }
    for claim, holds in claims.items():
        print(f"  {'yes' if holds else 'NO '}  {claim}")
    return all(claims.values())


def main() -> int:
    parser = argparse.ArgumentParser(description="What memory is for, on generated pieces.")
    parser.add_argument("--root", default="runs", help="folder of runs")
    parser.add_argument("overrides", nargs="*", help="options for dsmr fit, such as --trainer.max_steps=50")
    options, overrides = parser.parse_known_args()
    overrides += options.overrides
    began = time.perf_counter()
    root = Path(options.root) / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    two_scale, memoryless = root / "two_scale", root / "memoryless"
    run(["fit", *CONFIG, "--root", str(root), "--name", "two_scale", *overrides])
    run(["fit", *CONFIG, "--root", str(root), "--name", "memoryless", "--model.horizons", "2x0", *overrides])
    results = {
        "two-scale 1x512+1x64": (two_scale, []),
        "memoryless 2x0": (memoryless, []),
        "two-scale, memory emptied": (two_scale, ["--model.horizons", "2x0"]),
    }
    columns = {}
    for number, (name, (folder, changes)) in enumerate(results.items()):
        output = root / f"recall_{number}.json"
        run(["validate", "--checkpoint", str(folder), *changes, "--output", str(output)])
        columns[name] = recall(output)
    run(["generate", "--checkpoint", str(two_scale), "--seconds", "30", "--output", str(root / "sample.mid")])
    print(f"\nPerplexity of the answers by distance in tokens (1 = perfect recall, {NUM_MARKS} = chance)\n")
    print(table(columns))
    holds = verdict(columns)
    print(f"\n{time.perf_counter() - began:.0f} s; MIDI sample: {root / 'sample.mid'}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
