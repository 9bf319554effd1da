"""Whether the schedule that `dsmr analyze` suggests is as good as the best hand-made one, where the truth is known.

    python experiments/recall/suggestion.py [--root runs/suggestion]

On the recall task: a model with a long memory in both layers is trained and analyzed for the budget of the
hand-made schedules; then the suggestion and each of them are trained alike. Scored is the perplexity of answers, 1
for perfect recall and 16 for chance, at the distances that the longest of the horizons reach. What is done is not
done again.
"""

import argparse
import json
import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from dsmr.benchmark.machine import current_commit, hardware_info, package_versions
from dsmr.cli import main as dsmr

HERE = Path(__file__).resolve().parent
FULL = "2x512"
HAND_MADE = ["1x512+1x64", "1x64+1x512", "1x320+1x256", "1x256+1x320", "1x576+1x0"]
BUDGET = 576
SEED = 0
REACH = 448
PREFIX = "val/recall/perplexity_"


def run(arguments: list[str], output: Path) -> dict[str, Any]:
    """What a command found; from its file, where there is one.

    Raises:
        SystemExit: it failed, and has said why.
    """
    if not output.is_file():
        print(f"\n$ dsmr {shlex.join(arguments)}", flush=True)
        status = dsmr([*arguments, "--output", str(output)])
        if status:
            sys.exit(status)
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


def train(horizons: str, root: Path) -> dict[str, float]:
    """Perplexity of answers by distance, of the last weights, and nats per note of the validation pieces."""
    last = root / horizons / "last.ckpt"
    which = ["--config", "recall", f"--model.horizons={horizons}", f"--root={root}", f"--name={horizons}"]
    which += [f"--seed_everything={SEED}"]
    if last.is_file():
        which = ["--resume", str(last.parent)]
    else:
        shutil.rmtree(last.parent, ignore_errors=True)
    quiet = "--trainer.enable_progress_bar=false"
    run(["fit", *which, quiet], root / f"{horizons}.fit.json")
    return dict(run(["validate", "--checkpoint", str(last), quiet], root / f"{horizons}.json")["metrics"])


def perplexity(metrics: dict[str, float]) -> float:
    """Of all answers within reach."""
    nats = [math.log(v) for k, v in metrics.items() if k.startswith(PREFIX) and int(k.removeprefix(PREFIX)) <= REACH]
    return math.exp(sum(nats) / len(nats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/suggestion"))
    parser.add_argument("--output", type=Path, default=HERE / "suggestion.json")
    options = parser.parse_args()
    options.root.mkdir(parents=True, exist_ok=True)
    trained = {FULL: train(FULL, options.root)}
    analysis = run(
        ["analyze", "--checkpoint", str(options.root / FULL), f"--budget={BUDGET}"], options.root / "analysis.json"
    )
    suggested = analysis["suggested"]
    for horizons in dict.fromkeys([suggested, *HAND_MADE]):
        trained[horizons] = train(horizons, options.root)
    scores = {horizons: perplexity(metrics) for horizons, metrics in trained.items()}
    result = {
        "command": "python experiments/recall/suggestion.py",
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
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for horizons, score in scores.items():
        print(f"{horizons:<12} answers {score:7.3f}{'  suggested' if horizons == suggested else ''}")


if __name__ == "__main__":
    main()
