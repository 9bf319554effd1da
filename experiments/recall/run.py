"""Compare the schedule that `dsmr analyze` suggests with hand-made ones, on a task where the answer is known.

    python experiments/recall/run.py [--root runs] [options of dsmr fit]

On the recall task, `dsmr sweep recall --local` trains hand-made schedules of one budget, and a model with a long
memory in both layers. `dsmr analyze` suggests a schedule from that model, which is trained as well if it is not among
the hand-made ones. The score is the perplexity of the answers (1 is perfect recall, 16 is chance) at the distances
that the longest horizon reaches. Finished work is kept: re-run the same command to resume. Writes results.json.
"""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from dsmr.benchmark.machine import current_commit, hardware_info, package_versions
from dsmr.cli import main as dsmr

HERE = Path(__file__).resolve().parent
FULL = "2x512"
BUDGET = 576
SEED = 0
REACH = 448
PREFIX = "val/recall/perplexity_"


def run(arguments: list[str]) -> None:
    """Run a `dsmr` command; leave if it fails."""
    print(f"\n$ dsmr {shlex.join(arguments)}", flush=True)
    status = dsmr(arguments)
    if status:
        sys.exit(status)


def result_of(arguments: list[str], output: Path) -> dict[str, Any]:
    """Return the result of a command, from its file where there is one."""
    if not output.is_file():
        run([*arguments, "--output", str(output)])
    result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return result


def validate(run_folder: Path) -> dict[str, float]:
    """Validate the last weights of a run."""
    options = ["--checkpoint", str(run_folder / "last.ckpt"), "--trainer.enable_progress_bar=false"]
    return dict(result_of(["validate", *options], run_folder / "validation.json")["metrics"])


def answer_perplexity(metrics: dict[str, float]) -> float:
    """Return the perplexity of all answers within reach."""
    nats = [math.log(v) for k, v in metrics.items() if k.startswith(PREFIX) and int(k.removeprefix(PREFIX)) <= REACH]
    return math.exp(sum(nats) / len(nats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of the sweep's folder")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of results.json")
    options, overrides = parser.parse_known_args()
    folder, suggestion = options.root / "recall", options.root / "suggestion"
    run(["sweep", "recall", "--local", "--root", str(options.root), *overrides])
    full = folder / f"horizons={FULL}"
    analysis = result_of(["analyze", "--checkpoint", str(full), f"--budget={BUDGET}"], full / "analysis.json")
    suggested = analysis["suggested"]
    runs = {path.name.removeprefix("horizons="): path for path in sorted(folder.glob("horizons=*"))}
    if suggested not in runs:
        runs[suggested] = suggestion / suggested
        fresh = ["--config=recall", f"--seed_everything={SEED}", f"--model.horizons={suggested}", *overrides]
        start = ["--resume", str(runs[suggested])]
        if not (runs[suggested] / "last.ckpt").is_file():
            start = [*fresh, f"--root={suggestion}", f"--name={suggested}"]
        run(["fit", *start, "--trainer.enable_progress_bar=false"])
    trained = {horizons: validate(path) for horizons, path in runs.items()}
    scores = {horizons: answer_perplexity(metrics) for horizons, metrics in trained.items()}
    result = {
        "command": "python experiments/recall/run.py",
        "commit": current_commit(),
        "config": "recall",
        "seed": SEED,
        "hardware": hardware_info(torch.device("cpu")),
        "versions": package_versions(),
        "budget": BUDGET,
        "suggested": suggested,
        "steps": analysis["steps"],
        "layers": [{k: layer[k] for k in ("layer", "horizon", "saved")} for layer in analysis["layers"]],
        "nats_per_note": {
            "predicted": analysis["predicted_nats_per_note"],
            "trained": {horizons: metrics["val/nats_per_note"] for horizons, metrics in trained.items()},
        },
        "answers": scores,
    }
    (options.output / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for horizons, score in scores.items():
        print(f"{horizons:<12} answers {score:7.3f}{'  suggested' if horizons == suggested else ''}")


if __name__ == "__main__":
    main()
