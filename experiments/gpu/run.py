"""What only a GPU can show, unattended and in calls that continue each other.

    python experiments/gpu/run.py --out FOLDER [--pack FOLDER] [--minutes 9] [--tokens N] [--only STEP ...]

Steps, in this order: `tests` (those marked gpu), `benchmark` and its companions (rows at base.yaml's size), then the
rows of experiments/paper_table.yaml, two_scale and full first, each through `dsmr fit` and `dsmr validate`. A call
ends in time: a training run that is not done yet saves itself and goes on in the next call, and what is done is not
done again. Each step leaves its JSON in FOLDER at once. What a step printed is in `STATE/STEP.log`.

`--pack` names what `pack.sh` made: a token store, and wheels for a machine without a network.
`--dry-run` takes the same way on a CPU in a minute, at configs/smoke.yaml's size: figures mean nothing then.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
TABLE = HERE.parent / "paper_table.yaml"
FIRST = ("two_scale", "full", "memoryless", "windowed", "two_scale_interleaved", "two_scale_whole")
LEAST_SECONDS = 45.0  # a training run is not begun or continued with less
SAVING_SECONDS = 25.0  # kept for the end of a training run
TOKENS, TOKENS_PER_STEP = 200_000_000, 4096  # of every row of the table
DRY_TOKENS, DRY_TOKENS_PER_STEP = 1536, 256  # of configs/smoke.yaml


BENCHMARKS: dict[str, tuple[list[str], list[str]]] = {
    "benchmark": (["full", "two_scale", "memoryless", "materialised_full", "perceiver_ar", "x_transformers_xl"], []),
    "benchmark_eager": (["full", "two_scale"], ["--model.backbone.compile_blocks", "false"]),
    "benchmark_half": (["full", "two_scale"], ["--trainer.precision", "16-mixed"]),
    "benchmark_rows": (
        ["full", "uniform", "binary", "binary_sliding", "ascending", "two_scale_whole", "windowed"],
        ["--benchmark.piece_lengths", "[]"],
    ),
    "benchmark_decoding": (
        ["full", "full_decode", "two_scale_decode", "memoryless_decode", "full_decode_8", "two_scale_decode_8"],
        ["--benchmark.decode_lanes", "[1, 8]", "--benchmark.piece_lengths", "[]"],
    ),
    "benchmark_peers": (["full", "perceiver_ar_pytorch", "materialised_two_scale", "x_transformers_decode"], []),
}
"""Rows and further options of each step, what matters most first."""
DRY_BENCHMARK = [
    f"--benchmark.{key}={value}"
    for key, value in {"repeats": 1, "warmup": 0, "steps": 1, "piece_lengths": "[128]", "decode_tokens": 2}.items()
]


@dataclass
class Call:
    """One call: how long it may last, where it leaves what.

    Attributes:
        out: results, a JSON file for each step.
        state: runs and logs, which the next call goes on with.
        ends: on the monotonic clock.
        dry: on a CPU, tiny.
        tokens: that each row of the table is trained on.
    """

    out: Path
    state: Path
    ends: float
    dry: bool
    tokens: int

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def is_done(self, step: str) -> bool:
        """Whether an earlier call has done it."""
        return (self.state / f"{step}.json").is_file()

    def leave(self, step: str, result: dict[str, object], *, done: bool = True) -> None:
        """Write a step's result where it is fetched from, and keep it if the step is done."""
        text = json.dumps(result, indent=2) + "\n"
        (self.out / f"{step}.json").write_text(text, encoding="utf-8")
        if done:
            (self.state / f"{step}.json").write_text(text, encoding="utf-8")
        print(f"{step}: {'done' if done else 'not done yet'}", flush=True)

    def run(self, step: str, command: list[str], seconds: float) -> int:
        """Run a command with its output in the step's log; after so many seconds it is asked to end, then made to."""
        with (self.state / f"{step}.log").open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            try:
                return process.wait(timeout=max(seconds, 1.0))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                return 124

    def tail(self, step: str, count: int = 15) -> list[str]:
        """Last lines of a step's log."""
        return (self.state / f"{step}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-count:]


def dsmr(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from dsmr.cli import main; sys.exit(main())", *arguments]


def tests(call: Call) -> None:
    """The tests that need a GPU; in a dry run, those of one file that do not."""
    chosen = ["tests/test_horizons.py"] if call.dry else ["-m", "gpu"]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "-q", *chosen]
    status = call.run("tests", pytest, call.left)
    call.leave("tests", {"exit_status": status, "output": call.tail("tests", 60)}, done=status == 0)


def benchmark(call: Call, step: str) -> None:
    """Some rows of the benchmark, in one run; `full` is among them all, so that ratios are of one process."""
    target = call.state / f"{step}.partial.json"
    rows, options = BENCHMARKS[step]
    config = ["--config", "smoke", *DRY_BENCHMARK] if call.dry else ["--config", "benchmark_gpu", *options]
    command = dsmr("benchmark", *config, "--benchmark.rows", f"[{', '.join(rows)}]", "--output", str(target))
    status = call.run(step, command, call.left)
    if status == 0:
        call.leave(step, json.loads(target.read_text(encoding="utf-8")))
    else:
        call.leave(step, {"exit_status": status, "output": call.tail(step)}, done=False)


def train(call: Call, row: str) -> None:
    """Train a row of the table, from where the last call left it, and validate its best."""
    step, folder = f"train_{row}", call.state / "runs" / row
    if call.left < LEAST_SECONDS and not call.dry:
        return
    steps = call.tokens // (DRY_TOKENS_PER_STEP if call.dry else TOKENS_PER_STEP)
    if (folder / "last.ckpt").is_file():
        options = ["--resume", str(folder)]
    elif call.dry:
        shutil.rmtree(folder, ignore_errors=True)
        options = ["--config", "smoke", "--root", str(folder.parent), "--name", row, *dry_row(row)]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        options = ["--config", row, "--trainer.precision", "bf16-mixed", "--root", str(folder.parent), "--name", row]
        options += ["--trainer.val_check_interval", str(max(steps // 10, 1)), "--trainer.limit_val_batches", "0.25"]
    limit = int(trained_seconds(folder) + max(call.left - SAVING_SECONDS, 5.0))
    time_limit = f"{limit // 86400:02d}:{limit // 3600 % 24:02d}:{limit // 60 % 60:02d}:{limit % 60:02d}"
    options += ["--trainer.max_steps", str(steps), "--trainer.max_time", time_limit]
    began = time.monotonic()
    status = call.run(step, dsmr("fit", *options, "--json", "--trainer.enable_progress_bar", "false"), call.left)
    result: dict[str, object] = {"row": row, "exit_status": status, "seconds": time.monotonic() - began}
    rows = (
        (folder / "metrics.csv").read_text(encoding="utf-8").splitlines() if (folder / "metrics.csv").is_file() else []
    )
    result["metrics_csv"] = rows
    if status != 0 or not is_finished(folder, steps):
        call.leave(step, result | {"output": call.tail(step)}, done=False)
        return
    target = folder / "validation.json"
    status = call.run(step, dsmr("validate", "--checkpoint", str(folder), "--output", str(target)), call.left)
    if status == 0:
        result["validation"] = json.loads(target.read_text(encoding="utf-8"))
    call.leave(step, result | {"output": call.tail(step)}, done=status == 0)


def dry_row(row: str) -> list[str]:
    horizons = {"full": "2x640", "two_scale": "1x320+1x64"}
    return ["--model.horizons", horizons[row], "--trainer.val_check_interval", "3"]


def is_finished(folder: Path, steps: int) -> bool:
    """Whether the run's last checkpoint is that of its last step."""
    return int(last_checkpoint(folder).get("global_step", 0)) >= steps


def trained_seconds(folder: Path) -> float:
    """How long the run has been trained by Lightning's timer, which counts over all calls."""
    callbacks = last_checkpoint(folder).get("callbacks", {})
    elapsed = [state["time_elapsed"]["train"] for name, state in callbacks.items() if name.startswith("Timer")]
    return float(max(elapsed, default=0.0))


def last_checkpoint(folder: Path) -> dict[str, Any]:
    """Content of the run's last checkpoint; nothing where there is none."""
    import torch

    if not (folder / "last.ckpt").is_file():
        return {}
    content: dict[str, Any] = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True)
    return content


def table() -> list[str]:
    """Rows of the paper's table, those first whose comparison matters most."""
    rows: list[str] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))["parameters"]["config"]["values"]
    return [*FIRST, *(row for row in rows if row not in FIRST)]


def prepare_environment(pack: Path | None, state: Path) -> None:
    """Let the steps find this checkout's package, the pack's wheels and its token store."""
    paths = [str(HERE.parent.parent / "src")]
    if pack is not None:
        site, store = state / "site", state / "store"
        wheels = sorted(map(str, (pack / "wheels").glob("*.whl")))
        if wheels and not site.is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
            subprocess.run([*pip, *wheels], check=True)
        if not store.is_dir():
            with tarfile.open(pack / "store.tar.xz") as packed:
                packed.extractall(state, filter="data")
        paths.append(str(site))
        os.environ["DSMR_MAESTRO"] = str(store.resolve())
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.environ["PYTHONUNBUFFERED"] = "1"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--tokens", type=int, help="that each row is trained on")
    parser.add_argument("--pack", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="of these steps only: tests, benchmark, train_ROW")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    for folder in (options.out, options.state):
        folder.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes
    tokens = options.tokens or (DRY_TOKENS if options.dry_run else TOKENS)
    call = Call(options.out, options.state, ends, options.dry_run, tokens)
    prepare_environment(options.pack, options.state)
    steps = {"tests": lambda: tests(call)}
    for name in [*BENCHMARKS][:1] if call.dry else BENCHMARKS:
        steps[name] = lambda name=name: benchmark(call, name)
    for row in FIRST[:2] if call.dry else table():
        steps[f"train_{row}"] = lambda row=row: train(call, row)
    for name in options.only:
        if name not in steps:
            parser.error(f"--only {name} is unknown; known: {', '.join(steps)}")
    for name, step in steps.items():
        if (options.only and name not in options.only) or call.is_done(name) or call.left < 1:
            continue
        try:
            step()
        except Exception as error:
            call.leave(name, {"error": repr(error)}, done=False)
    todo = [name for name in steps if not call.is_done(name) and (not options.only or name in options.only)]
    print(f"to do: {', '.join(todo) if todo else 'nothing'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
