"""Show what memory is for, in two minutes on a CPU, on generated pieces.

The pieces ask, after a long silence, for what was heard long ago. Two models of equal size are trained on them, one
with a two-scale memory, the other with none. Both are validated, the two-scale model also with its memory taken away.
The table shows the perplexity of the answers by distance: 1 is perfect recall, 16 is chance. At the end the two-scale
model writes a piece of MIDI.

    python experiments/demo/run.py [--root runs] [options of dsmr fit]
"""

import argparse
import json
import sys
import time
from datetime import datetime
from pathlib import Path

from dsmr.cli import main as dsmr
from dsmr.data.synthetic import NUM_MARKS, RecallTask

REACH = 512
"""Tokens of the two-scale model's long horizon."""


def run(arguments: list[str]) -> None:
    """Run a `dsmr` command; leave if it fails."""
    print(f"\n$ dsmr {' '.join(arguments)}", flush=True)
    status = dsmr(arguments)
    if status:
        sys.exit(status)


def recall_by_distance(result: Path) -> dict[int, float]:
    """Return the perplexity by distance in tokens from a result file of `dsmr validate`."""
    metrics = json.loads(result.read_text(encoding="utf-8"))["metrics"]
    prefix = "val/recall/perplexity_"
    return {int(name.removeprefix(prefix)): value for name, value in metrics.items() if name.startswith(prefix)}


def format_table(columns: dict[str, dict[int, float]]) -> str:
    """Format the perplexities, a column for each model."""
    lines = [f"{'distance':>9}" + "".join(f"{name:>26}" for name in columns)]
    for distance in sorted(RecallTask().distances):
        mark = " " if distance <= REACH else "*"
        lines.append(f"{distance:>8}{mark}" + "".join(f"{column[distance]:>26.2f}" for column in columns.values()))
    return "\n".join([*lines, f"  * beyond the long horizon of {REACH} tokens"])


def check_claims(columns: dict[str, dict[int, float]]) -> bool:
    """Print the demo's claims, and return True if all hold."""
    with_memory, without, emptied = columns.values()
    worst = max(value for distance, value in with_memory.items() if distance <= REACH)
    chance = 0.8 * NUM_MARKS
    best, best_emptied = min(without.values()), min(emptied.values())
    claims = {
        f"two-scale recalls within its reach (worst {worst:.3f}, at most 1.1)": worst <= 1.1,
        f"memoryless is at chance (best {best:.1f}, at least {chance:.1f})": best >= chance,
        f"so is two-scale without its memory (best {best_emptied:.1f})": best_emptied >= chance,
    }
    for claim, holds in claims.items():
        print(f"  {'yes' if holds else 'NO '}  {claim}")
    return all(claims.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of the demo's folder")
    options, overrides = parser.parse_known_args()
    began = time.perf_counter()
    root = options.root / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    run(["sweep", "demo", "--local", "--root", str(root), *overrides])
    two_scale, memoryless = (root / "demo" / f"horizons={horizons}" for horizons in ("1x512+1x64", "2x0"))
    results = {
        "two-scale 1x512+1x64": (two_scale, []),
        "memoryless 2x0": (memoryless, []),
        "two-scale, memory emptied": (two_scale, ["--model.horizons", "2x0"]),
    }
    columns = {}
    for number, (name, (folder, changes)) in enumerate(results.items()):
        output = root / f"recall_{number}.json"
        run(["validate", "--checkpoint", str(folder), *changes, "--output", str(output)])
        columns[name] = recall_by_distance(output)
    run(["generate", "--checkpoint", str(two_scale), "--seconds", "30", "--output", str(root / "sample.mid")])
    print(f"\nPerplexity of the answers by distance in tokens (1 = perfect recall, {NUM_MARKS} = chance)\n")
    print(format_table(columns))
    holds = check_claims(columns)
    print(f"\n{time.perf_counter() - began:.0f} s; MIDI sample: {root / 'sample.mid'}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
