"""Two processes on a CPU (gloo) under `dsmr fit`: train like one, read every token once, and report a lost process.

    python tests/trials/ddp.py [--short] [--output FILE.json] [--root FOLDER]

Lightning starts the other process from the same command line. This file, called with `dsmr` first, acts as the
program: it records what each process reads, and ends one of them where the trial asks for it.
"""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from processes import run, wrap

from dsmr.cli import main
from dsmr.training.module import RecurrentLM

SETTINGS = [
    "--config=smoke",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
    "--trainer.val_check_interval=10",
    "--trainer.max_steps=20",
    "--data.recall.num_train=7",
    "--data.recall.num_validation=3",
    "--data.transpose=3",
    "--model.backbone.d_model=16",
    "--save_every_n_steps=5",
    "--sample_every_n_steps=0",
]
STRATEGY = "lightning.pytorch.strategies.DDPStrategy"
TIMEOUT = 20
TWO = [f"--trainer.strategy={STRATEGY}", f"--trainer.strategy.timeout=0:00:{TIMEOUT}", "--trainer.devices=2"]
EXACT = ["--trainer.precision", "64-true", "--model.backbone.dropout", "0"]


def stand_in(arguments: list[str]) -> int:
    """Act as `dsmr`, with the changes that the environment asks for."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    folder, ending = os.environ.get("TRIAL_NOTES"), os.environ.get("TRIAL_ENDS")

    def note(lm: Any, batch: Any, *_: Any) -> None:
        counts = (batch.targets_BT != -100).sum(1).tolist()
        line = json.dumps([batch.piece_B.tolist(), batch.position_B.tolist(), counts])
        with Path(folder or "", f"rank{rank}.jsonl").open("a") as file:
            file.write(line + "\n")

    def end(lm: Any, *_: Any) -> None:
        name, which, step = (ending or "").split(":")
        if rank == int(which) and lm.trainer.global_step == int(step):
            os.environ["TRIAL_ENDS"] = "SIGCONT:0:-1"
            os.kill(os.getpid(), getattr(signal, name))

    if folder:
        wrap(RecurrentLM, "training_step", before=note)
    if ending:
        wrap(RecurrentLM, "on_after_backward", before=end)
    return main(arguments)


def dsmr(log: Path, *arguments: str, **environment: str) -> tuple[int, float]:
    """Run this file as `dsmr`; return its exit status and duration."""
    command = [sys.executable, str(Path(__file__).resolve()), "dsmr", *arguments]
    began = time.monotonic()
    with log.open("a") as file:
        try:
            ended = subprocess.run(
                command,
                env={**os.environ, **environment},
                stdout=file,
                stderr=file,
                check=False,
                timeout=180,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return 1000, time.monotonic() - began
    return ended.returncode, time.monotonic() - began


def fit(root: Path, name: str, *options: str, **environment: str) -> tuple[int, float]:
    """Start a run."""
    return dsmr(root / f"{name}.log", "fit", *SETTINGS, *options, "--root", str(root), "--name", name, **environment)


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the last checkpoint."""
    state: dict[str, torch.Tensor] = torch.load(run_folder / "last.ckpt", weights_only=True)["state_dict"]
    return state


def logged(run_folder: Path, column: str) -> list[float]:
    """Return a column of metrics.csv."""
    with (run_folder / "metrics.csv").open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


def apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of any weight."""
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def same_training(root: Path) -> dict[str, Any]:
    """Compare losses, weights and metrics of two processes of two lanes with one of four, in float64, no dropout."""
    failures = []
    (root / "notes").mkdir()
    statuses = [
        fit(root, "two", *TWO, *EXACT, "--data.num_lanes", "2", TRIAL_NOTES=str(root / "notes"))[0],
        fit(root, "one", *EXACT, "--data.num_lanes", "4")[0],
    ]
    if any(statuses):
        return {"cases": 1, "failures": [f"exit statuses {statuses}"]}
    two, one = root / "two", root / "one"
    differences = {"weights": apart(weights(two), weights(one))}
    for column in ("train/nll", "val/nll", "val/perplexity", "val/nats_per_note", "val/tokens"):
        pairs = list(zip(logged(two, column), logged(one, column), strict=True))
        differences[column] = max(abs(first - second) / abs(second) for first, second in pairs)
    for name, difference in differences.items():
        limit = 1e-8 if name == "weights" else 1e-6  # what is logged is float32
        if not difference <= limit:
            failures.append(f"{name} differ by {difference:g}")
    return {"cases": 1, "differences": differences, "failures": failures + once_each(root / "notes")}


def once_each(notes: Path) -> list[str]:
    """Check that both processes took equally many steps and read no position of a piece twice within an epoch."""
    ranks = [
        [json.loads(line) for line in (notes / f"rank{rank}.jsonl").read_text().splitlines()] for rank in range(2)
    ]
    if len(ranks[0]) != len(ranks[1]):
        return [f"the processes took {[len(steps) for steps in ranks]} steps"]
    seen = Counter(
        (piece, position, count)
        for steps in ranks
        for pieces, positions, counts in steps
        for piece, position, count in zip(pieces, positions, counts, strict=True)
        if piece >= 0
    )
    twice = [place for place, times in seen.items() if times > 1]
    return [f"read twice within 20 steps of a longer epoch: {twice[:3]}"] if twice else []


def whole_epochs(root: Path) -> dict[str, Any]:
    """Train an epoch of unequal pieces over two processes: each token is predicted once, no process waits forever."""
    failures = []
    notes = root / "epoch"
    notes.mkdir()
    options = ["--trainer.max_epochs", "1", "--trainer.max_steps", "500", "--data.num_lanes", "2"]
    status, _ = fit(root, "epoch-run", *TWO, *options, TRIAL_NOTES=str(notes))
    if status:
        return {"cases": 1, "failures": [f"exit status {status}"]}
    failures += once_each(notes)
    total = 0
    for rank in range(2):
        for line in (notes / f"rank{rank}.jsonl").read_text().splitlines():
            total += sum(json.loads(line)[2])
    index = json.loads(next((root / "cache").glob("*/index.json")).read_text())
    expected = sum(piece["length"] - 1 for piece in index["pieces"] if piece["split"] == "train")
    if total != expected:
        failures.append(f"{total} tokens were predicted, not {expected}")
    return {"cases": 1, "tokens": total, "failures": failures}


def lost(root: Path, *, short: bool) -> dict[str, Any]:
    """Kill, hang or stop a process: the run ends with a message, and resumes as if undisturbed."""
    failures, lines, seconds = [], {}, {}
    status, _ = fit(root, "undisturbed", *TWO)
    if status:
        return {"cases": 0, "failures": [f"undisturbed: exit status {status}"]}
    trials = {
        "second killed": ("SIGKILL:1:12", None),
        "first killed": ("SIGKILL:0:8", -signal.SIGKILL),
        "second hangs": ("SIGSTOP:1:12", None),
        "second asked to stop": ("SIGTERM:1:7", 128 + signal.SIGTERM),
        "first asked to stop": ("SIGUSR1:0:13", 128 + signal.SIGUSR1),
    }
    for name in list(trials)[: 1 if short else None]:
        ending, expected = trials[name]
        run_name = name.replace(" ", "-")
        log = root / f"{run_name}.log"
        status, taken = fit(root, run_name, *TWO, TRIAL_ENDS=ending)
        seconds[name] = round(taken, 1)
        if status == 0 or (expected is not None and status != expected):
            failures.append(f"{name}: exit status {status}")
        if taken > 90:
            failures.append(f"{name}: the run took {taken:.0f} s to end")
        said = [line for line in log.read_text().splitlines() if line.startswith(("dsmr: error", "stopped after"))]
        lines[name] = said[-1].replace(str(root), "")[:300] if said else ""
        if not said and expected != -signal.SIGKILL:
            failures.append(f"{name}: nothing was said")
        if "Traceback" in log.read_text():
            failures.append(f"{name}: a traceback")
        if stay := left_over(run_name):
            failures.append(f"{name}: processes {stay} stay")
        status, _ = dsmr(log, "fit", "--resume", str(root / run_name))
        if status:
            failures.append(f"{name}: it does not go on: exit status {status}")
        elif difference := apart(weights(root / run_name), weights(root / "undisturbed")):
            failures.append(f"{name}: weights differ by {difference:g}")
        elif logged(root / run_name, "train/nll") != logged(root / "undisturbed", "train/nll"):
            failures.append(f"{name}: other losses")
    return {"cases": len(seconds), "seconds": seconds, "lines": lines, "failures": failures}


def left_over(name: str) -> list[int]:
    """Return the processes of a run that remain after a while, and end them."""
    for _ in range(60):
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if name.encode() in words and b"dsmr" in words:
                found.append(int(path.parent.name))
        if not found:
            return []
        time.sleep(0.5)
    for process in found:
        os.kill(process, signal.SIGKILL)
    return found


def evaluated(root: Path) -> dict[str, Any]:
    """Compare `dsmr validate` by two processes and by one."""
    found = []
    for name, options in {"by-two": [*TWO, "--data.num_lanes", "2"], "by-one": ["--trainer.strategy", "auto"]}.items():
        output = root / f"{name}.json"
        one = ["--trainer.devices", "1"] if name == "by-one" else []
        run_folder = str(root / "one")
        status, _ = dsmr(
            root / f"{name}.log", "validate", "--checkpoint", run_folder, *options, *one, "--output", str(output)
        )
        if status:
            return {"cases": 1, "failures": [f"{name}: exit status {status}"]}
        found.append(json.loads(output.read_text())["metrics"])
    names = [name for name in found[1] if name.startswith("val/")]
    wrong = [name for name in names if not math.isclose(found[0][name], found[1][name], rel_tol=1e-6)]
    return {"cases": 1, "failures": [f"{name}: {found[0][name]} and {found[1][name]}" for name in wrong]}


def work(root: Path, *, short: bool) -> dict[str, Any]:
    """Run all trials in a folder."""
    os.environ["DSMR_CACHE"] = str(root / "cache")
    found = {"same_training": same_training(root), "lost": lost(root, short=short)}
    if not short:
        found |= {"whole_epochs": whole_epochs(root), "evaluated": evaluated(root)}
    return found


if __name__ == "__main__":
    raise SystemExit(stand_in(sys.argv[2:]) if sys.argv[1:2] == ["dsmr"] else run(__doc__, work))
