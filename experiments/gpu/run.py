"""Run everything that needs a GPU, unattended and in calls that continue each other.

    python3 experiments/gpu/run.py --out FOLDER [--pack FOLDER] [--minutes 9] [--tokens N] [--only STEP ...]

Steps, in this order:

tests        those marked gpu
benchmark    speed and memory of rows at base.yaml's size; full and two_scale again with all layers compiled as one
profile      a training step of two_scale and of full, by operation
probe        learning rates of AdamW and Muon on two_scale; the best is used for every row
train        two_scale and full, then the rows to compare with them: `dsmr fit`, `dsmr validate`
test         the test split, once, for the rows with published numbers
generate     music by two_scale: speed and memory over minutes of music
export       two_scale as a folder, in STATE
benchmark    other rows, precisions, decoding, peers
train        the other variants of dsmr.benchmark.variants

A call ends on time: a training run that is not done saves its state and resumes in the next call; finished steps are
skipped. A failed step is retried after all others, and skipped once it has failed twice. FOLDER/results.json has the
machine and the result of every step, written as soon as it is done. At its end, every call writes
FOLDER/report.tar.gz: the rows so far as a table, the finished ones compared piece by piece. `STATE/STEP.log` has the
output of a step. README.md estimates how long each takes.

`--pack` names the output of `pack.sh`: a token store, and wheels for a machine without a network.
`--dry-run` runs the same sequence on a CPU in a minute, at the size of configs/smoke.yaml; its numbers mean nothing.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FIRST = ("two_scale", "full", "memoryless", "windowed", "two_scale_interleaved", "two_scale_whole")
LEAST_SECONDS = 90.0  # a step needs at least this much: starting and compiling may take a minute
REPORT_SECONDS = 25.0  # reserved for the report
SAVING_SECONDS = 35.0  # reserved for the end of a training run
ENDING_SECONDS = 25.0  # for a step to end after SIGTERM
LIMITS = {"tests": 180.0, "benchmark": 300.0, "profile": 120.0}  # seconds, by the beginning of a step's name
TRIES = 2
VALIDATIONS = 4  # of each row while it trains
TOKENS, TOKENS_PER_STEP = 60_000_000, 4096  # of every row of the table
PROBE_TOKENS, PROFILE_STEPS = 8_000_000, 40
DRY_TOKENS, DRY_TOKENS_PER_STEP = 1536, 256  # of configs/smoke.yaml


BENCHMARKS: dict[str, tuple[list[str], list[str]]] = {
    "benchmark": (["full", "two_scale", "memoryless", "materialised_full", "perceiver_ar", "x_transformers_xl"], []),
    "benchmark_together": (
        ["full", "two_scale"],
        ["--model.backbone.compile_blocks", "together", "--benchmark.piece_lengths", "[]"],
    ),
    "benchmark_lanes": (["full", "two_scale"], ["--data.num_lanes", "32", "--benchmark.piece_lengths", "[]"]),
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
"""Rows and further options of each step, by importance; the first two decide how rows are compiled."""
PROBES = {
    **{
        f"adamw_{lr}": ["--model.optimizer=dsmr.training.AdamW", f"--model.optimizer.lr={lr}"]
        for lr in ("3e-4", "1e-3", "3e-3")
    },
    **{
        f"muon_{lr}": ["--model.optimizer=dsmr.training.Muon", f"--model.optimizer.lr={lr}"] for lr in ("1e-3", "3e-3")
    },
}
"""Options of each probe."""
DRY_BENCHMARK = [
    f"--benchmark.{key}={value}"
    for key, value in {"repeats": 1, "warmup": 0, "steps": 1, "piece_lengths": "[128]", "decode_tokens": 2}.items()
]


@dataclass
class Call:
    """One call of the script: its time limit and folders.

    Attributes:
        out: results of this call, in one JSON file.
        state: runs and logs, from which the next call continues.
        ends: time limit on the monotonic clock.
        dry: run on a CPU, at a tiny size.
        tokens: training tokens of each row.
        pack: output of pack.sh, for a machine without a network.
    """

    out: Path
    state: Path
    ends: float
    dry: bool
    tokens: int
    pack: Path | None

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.ends - time.monotonic()

    def is_done(self, step: str) -> bool:
        """Return True if an earlier call has finished the step."""
        return (self.state / f"{step}.json").is_file()

    def failures(self, step: str) -> int:
        """Return how often the step has failed, over all calls."""
        failed = self.state / f"{step}.failed"
        return len(failed.read_text(encoding="utf-8").splitlines()) if failed.is_file() else 0

    def seconds_for(self, step: str) -> float:
        """Return the time left, or the step's own limit if that is shorter."""
        limits = [seconds for name, seconds in LIMITS.items() if step.startswith(name)]
        return min([self.left, *limits])

    def leave(self, step: str, result: dict[str, object], *, done: bool = True, failed: bool = True) -> None:
        """Write a step's result to `out`, and to `state` if the step is done.

        Otherwise the step counts as failed, unless the call's time is over or `failed` is False.
        """
        if not done and failed and self.left > 0:
            with (self.state / f"{step}.failed").open("a", encoding="utf-8") as file:
                file.write(f"{result.get('error') or result.get('exit_status')}\n")
        if done:
            (self.state / f"{step}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        results = self.out / "results.json"
        found = (
            json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {"machine": machine(self.pack)}
        )
        text = json.dumps(found | {step: result}, indent=2) + "\n"
        results.with_suffix(".part").write_text(text, encoding="utf-8")
        results.with_suffix(".part").replace(results)
        print(f"{step}: {'done' if done else 'not done yet'}", flush=True)

    def run(self, step: str, command: list[str], seconds: float) -> int:
        """Run a command, log its output, and after `seconds` end it with SIGTERM, then SIGKILL."""
        with (self.state / f"{step}.log").open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            try:
                return process.wait(timeout=max(seconds, 1.0))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout=ENDING_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                return 124

    def tail(self, step: str, count: int = 15) -> list[str]:
        """Return the last lines of a step's log."""
        return (self.state / f"{step}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-count:]


def dsmr(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from dsmr.cli import main; sys.exit(main())", *arguments]


def tests(call: Call) -> None:
    """Run the tests that need a GPU; in a dry run, those of the same file that do not."""
    chosen = ["-m", "not gpu"] if call.dry else ["-m", "gpu", "-W", "default"]  # Inductor warns of what is slow
    pytest = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-p", "no:cacheprovider", "-n", "0", "-q", *chosen]
    status = call.run("tests", pytest, call.seconds_for("tests"))
    call.leave("tests", {"exit_status": status, "output": call.tail("tests", 60)}, done=status == 0)


def benchmark(call: Call, step: str) -> None:
    """Some rows of the benchmark, in one run; `full` is among them all, so that ratios are of one process."""
    target = call.state / f"{step}.partial.json"
    rows, options = BENCHMARKS[step]
    config = ["--config", "smoke", *DRY_BENCHMARK] if call.dry else ["--config", "benchmark_gpu", *options]
    command = dsmr("benchmark", *config, "--benchmark.rows", f"[{', '.join(rows)}]", "--output", str(target))
    target.unlink(missing_ok=True)
    status = call.run(step, command, call.seconds_for(step))
    if target.is_file():
        call.leave(step, json.loads(target.read_text(encoding="utf-8")))
    else:
        call.leave(step, {"exit_status": status, "output": call.tail(step)}, done=False)


def profile(call: Call, row: str) -> None:
    """Profile a training step of a row by operation, with Lightning's profiler."""
    step, folder = f"profile_{row}", call.state / "profiles" / row
    shutil.rmtree(folder, ignore_errors=True)
    steps = 12 if call.dry else PROFILE_STEPS
    profiler = {
        "dirpath": folder,
        "filename": "profile",
        "export_to_chrome": "false",
        "row_limit": 30,
        "sort_by_key": "cpu_time_total" if call.dry else "cuda_time_total",
    }
    options = [*of_row(call, row), f"--root={folder.parent}", f"--name={row}", f"--trainer.max_steps={steps}"]
    options += ["--sample_every_n_steps=0"]
    options += ["--trainer.limit_val_batches=0", "--trainer.profiler=lightning.pytorch.profilers.PyTorchProfiler"]
    options += [f"--trainer.profiler.init_args.{key}={value}" for key, value in profiler.items()]
    status = call.run(step, dsmr("fit", *options, "--trainer.enable_progress_bar=false"), call.seconds_for(step))
    tables = [path.read_text(encoding="utf-8").splitlines() for path in sorted(folder.glob("fit-profile*.txt"))]
    result: dict[str, object] = {
        "exit_status": status,
        "table": tables[-1] if tables else [],
        "output": call.tail(step),
    }
    call.leave(step, result, done=status == 0 and bool(tables))


def of_row(call: Call, row: str) -> list[str]:
    """Return the options of a row, or of its substitute in a dry run."""
    if not call.dry:
        return [
            "--config",
            row,
            "--trainer.precision",
            "bf16-mixed",
            "--model.backbone.compile_blocks",
            compiled(call),
        ]
    return ["--config", "smoke", "--model.horizons", {"full": "2x640", "two_scale": "1x320+1x64"}[row]]


def compiled(call: Call) -> str:
    """Return how layers are compiled: together if two_scale was faster with it; the same for all rows and calls."""
    kept = call.state / "compiled.json"
    if not kept.is_file():
        speeds = {}
        for step, way in (("benchmark", "true"), ("benchmark_together", "together")):
            if call.is_done(step):
                rows = json.loads((call.state / f"{step}.json").read_text(encoding="utf-8"))["rows"]
                by_name = {row["name"]: row.get("tokens_per_second", 0.0) for row in rows}
                speeds[way] = by_name.get("two_scale", 0.0)
        kept.write_text(json.dumps(max(speeds, key=speeds.__getitem__, default="true")), encoding="utf-8")
    found: str = json.loads(kept.read_text(encoding="utf-8"))
    return found


def fit(
    call: Call, step: str, folder: Path, options: list[str], tokens: int, validations: int
) -> dict[str, object] | None:
    """Start or resume a training run; return its result if it is finished, otherwise record its progress."""
    steps = tokens // (DRY_TOKENS_PER_STEP if call.dry else TOKENS_PER_STEP)
    every = 3 if call.dry else max(steps // validations, 1)
    options = [*options, "--seed_everything=0", "--root", str(folder.parent), "--name", folder.name]
    options += ["--trainer.val_check_interval", str(every), "--trainer.limit_val_batches", "0.25"]
    options += [
        "--save_every_n_steps",
        str(steps),
        "--sample_every_n_steps",
        "0",
    ]  # stops and the end are saved in any case
    until = ["--trainer.max_steps", str(steps)]
    if not (folder / "last.ckpt").is_file():
        shutil.rmtree(folder, ignore_errors=True)
    which = ["--resume", str(folder)] if folder.is_dir() else options
    limit = int(trained_seconds(folder) + max(call.left - SAVING_SECONDS, 5.0))
    time_limit = f"{limit // 86400:02d}:{limit // 3600 % 24:02d}:{limit // 60 % 60:02d}:{limit % 60:02d}"
    quiet = ["--trainer.max_time", time_limit, "--json", "--trainer.enable_progress_bar", "false"]
    status = call.run(step, dsmr("fit", *which, *until, *quiet), call.left)
    result: dict[str, object] = {"exit_status": status, "options": [*options, *until]}
    result["seconds"] = trained_seconds(folder)  # over all calls
    metrics = folder / "metrics.csv"
    result["metrics_csv"] = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    if status == 0 and is_finished(folder, steps):
        return result
    call.leave(step, result | {"output": call.tail(step)}, done=False, failed=status != 0)
    return None


def probe(call: Call, name: str) -> None:
    """Train two_scale briefly with one optimizer and learning rate."""
    folder = call.state / "probes" / name
    warmup = [
        "--model.lr_scheduler=dsmr.training.WarmupCosine",
        f"--model.lr_scheduler.warmup_steps={1 if call.dry else 200}",
    ]
    options = [*of_row(call, "two_scale"), *PROBES[name], *warmup]
    result = fit(call, f"probe_{name}", folder, options, DRY_TOKENS if call.dry else PROBE_TOKENS, 1)
    if result is not None:
        found = [row["val/nats_per_note"] for row in csv.DictReader(result["metrics_csv"]) if row["val/nats_per_note"]]
        call.leave(f"probe_{name}", result | {"nats_per_note": float(found[-1])})


def best_probe(call: Call) -> str | None:
    """Return the best probe of those finished when the first row starts; every row uses its optimizer."""
    kept = call.state / "chosen.json"
    if not kept.is_file():
        done = {name: call.state / f"probe_{name}.json" for name in PROBES if call.is_done(f"probe_{name}")}
        losses = {name: json.loads(path.read_text(encoding="utf-8"))["nats_per_note"] for name, path in done.items()}
        kept.write_text(json.dumps(min(losses, key=losses.__getitem__) if losses else None), encoding="utf-8")
    found: str | None = json.loads(kept.read_text(encoding="utf-8"))
    return found


def train(call: Call, row: str) -> None:
    """Start or resume the training of a row, and validate its best checkpoint."""
    step, folder = f"train_{row}", call.state / "runs" / row
    best = best_probe(call)
    result = fit(call, step, folder, [*of_row(call, row), *(PROBES[best] if best else [])], call.tokens, VALIDATIONS)
    if result is None:
        return
    target = folder / "validation.json"
    whole = [
        "--trainer.limit_val_batches",
        "1.0",
        "--output",
        str(target),
    ]  # training validates on a part of the split
    status = call.run(step, dsmr("validate", "--checkpoint", str(folder), *whole), call.left)
    if status == 0:
        result["validation"] = json.loads(target.read_text(encoding="utf-8"))
    call.leave(step, result | {"row": row, "probe": best, "output": call.tail(step)}, done=status == 0)


def score_test(call: Call, row: str) -> None:
    """Score the best weights of a trained row on the test split, once."""
    step, folder = f"test_{row}", call.state / "runs" / row
    if not call.is_done(f"train_{row}"):
        return
    target = folder / "test.json"
    status = call.run(step, dsmr("test", "--checkpoint", str(folder), "--output", str(target)), call.left)
    found = json.loads(target.read_text(encoding="utf-8")) if status == 0 else {"output": call.tail(step)}
    call.leave(step, found | {"exit_status": status}, done=status == 0)


def generate(call: Call) -> None:
    """Measure speed and memory of generation by two_scale."""
    if not call.is_done("train_two_scale"):
        return
    more = ["--tokens", "20", "--seconds", "5"] if call.dry else ["--seconds", str(min(30, int(call.left / 4)))]
    command = [sys.executable, str(HERE / "music.py"), str(call.state / "runs" / "two_scale"), *more]
    status = call.run("generate", command, call.left)
    result = json.loads(call.tail("generate", 1)[0]) if status == 0 else {"output": call.tail("generate")}
    call.leave("generate", result | {"exit_status": status}, done=status == 0)


def export(call: Call) -> None:
    """Export the best weights of two_scale to a folder in STATE."""
    if not call.is_done("train_two_scale"):
        return
    target = call.state / "export"
    shutil.rmtree(target, ignore_errors=True)
    status = call.run("export", dsmr("export", str(call.state / "runs" / "two_scale"), str(target)), call.left)
    files = {path.name: path.stat().st_size for path in target.glob("*")} if target.is_dir() else {}
    call.leave("export", {"exit_status": status, "bytes": files, "output": call.tail("export")}, done=status == 0)


def report(call: Call) -> None:
    """Report all runs as a table with plots, compared piece by piece with `full` once that is finished."""
    runs, target = call.state / "runs", call.state / "report"
    against = ["--against", "full"] if call.is_done("train_full") else []
    if call.run("report", dsmr("report", str(runs), "--output", str(target), *against), REPORT_SECONDS) == 0:
        with tarfile.open(call.out / "report.tar.gz", "w:gz") as packed:
            packed.add(target, "report")
    else:
        print("no report:", *call.tail("report", 1), flush=True)


def is_finished(folder: Path, steps: int) -> bool:
    """Return True if the last checkpoint is that of the last step, after a complete validation."""
    content = last_checkpoint(folder)
    is_cut_off = any(state.get("is_validating") for state in content.get("callbacks", {}).values())
    return int(content.get("global_step", 0)) >= steps and not is_cut_off


def trained_seconds(folder: Path) -> float:
    """Return the training time of a run by Lightning's timer, which counts over all calls."""
    callbacks = last_checkpoint(folder).get("callbacks", {})
    elapsed = [state["time_elapsed"]["train"] for name, state in callbacks.items() if name.startswith("Timer")]
    return float(max(elapsed, default=0.0))


def last_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the content of the run's last checkpoint; empty if there is none."""
    import torch

    if not (folder / "last.ckpt").is_file():
        return {}
    content: dict[str, Any] = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True, mmap=True)
    return content


def table_rows() -> list[str]:
    """Return all variants, those whose comparison matters most first."""
    from dsmr.benchmark.variants import VARIANTS

    return [*FIRST, *(name for name in VARIANTS if name not in FIRST)]


def published_rows() -> set[str]:
    """Return the variants with published numbers; only these are scored on the test split."""
    from dsmr.benchmark.variants import VARIANTS

    return {name for name, variant in VARIANTS.items() if variant.published}


def prepare_environment(pack: Path | None, state: Path) -> None:
    """Make this checkout's package, the pack's wheels and its token store available to the steps."""
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
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.environ["PYTHONUNBUFFERED"] = "1"


def machine(pack: Path | None) -> dict[str, Any]:
    """Return commit, hardware and package versions."""
    import torch

    from dsmr.benchmark.machine import current_commit, hardware_info, package_versions

    noted = None if pack is None else pack / "commit"
    return {
        "commit": noted.read_text(encoding="utf-8").strip() if noted and noted.is_file() else current_commit(),
        **hardware_info(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": package_versions(),
    }


def every_step(call: Call) -> dict[str, Callable[[], None]]:
    """Return all steps in order."""
    first, rows = (FIRST[:2], FIRST[:2]) if call.dry else (FIRST, table_rows())
    published = published_rows()
    steps: dict[str, Callable[[], None]] = {"tests": lambda: tests(call)}
    speed, together, *companions = BENCHMARKS
    steps[speed] = partial(benchmark, call, speed)
    if not call.dry:
        steps[together] = partial(benchmark, call, together)
    steps |= {f"profile_{row}": partial(profile, call, row) for row in FIRST[:2]}
    steps |= {f"probe_{name}": partial(probe, call, name) for name in [*PROBES][:: 3 if call.dry else 1]}
    steps |= {f"train_{row}": partial(train, call, row) for row in first}
    steps |= {f"test_{row}": partial(score_test, call, row) for row in first if row in published}
    steps |= {"generate": partial(generate, call), "export": partial(export, call)}
    steps |= {name: partial(benchmark, call, name) for name in companions if not call.dry}
    steps |= {f"train_{row}": partial(train, call, row) for row in rows if row not in first}
    steps |= {f"test_{row}": partial(score_test, call, row) for row in rows if row in published and row not in first}
    return steps


def in_order(call: Call, names: list[str], only: list[str]) -> list[str]:
    """Return the steps to run: failed ones last, those that failed too often only if they are named."""
    if only:
        return [name for name in names if name in only and not call.is_done(name)]
    for name in names:
        if call.failures(name) >= TRIES:
            print(f"{name}: has failed {call.failures(name)} times; --only {name} tries it again", flush=True)
    left = [name for name in names if not call.is_done(name) and call.failures(name) < TRIES]
    return sorted(left, key=lambda name: call.failures(name) > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--tokens", type=int, help="training tokens of each row")
    parser.add_argument("--pack", type=Path)
    parser.add_argument(
        "--only", nargs="*", default=[], help="run only these steps: tests, benchmark, probe_NAME, train_ROW, ..."
    )
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    for folder in (options.out, options.state):
        folder.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes - REPORT_SECONDS
    tokens = options.tokens or (DRY_TOKENS if options.dry_run else TOKENS)
    call = Call(options.out, options.state, ends, options.dry_run, tokens, options.pack)
    prepare_environment(options.pack, options.state)
    steps = every_step(call)
    for name in options.only:
        if name not in steps:
            parser.error(f"--only {name} is unknown; known: {', '.join(steps)}")
    for name in in_order(call, [*steps], options.only):
        if call.left < (1 if call.dry else LEAST_SECONDS):
            break
        try:
            steps[name]()
        except Exception as error:
            call.leave(name, {"error": repr(error)}, done=False)
    if any(call.is_done(f"train_{row}") for row in table_rows()):
        report(call)
    todo = [name for name in steps if not call.is_done(name) and (not options.only or name in options.only)]
    print(f"to do: {', '.join(todo) if todo else 'nothing'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
