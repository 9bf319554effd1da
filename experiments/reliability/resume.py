"""One run that is killed again and again, beside the same run left alone: what they leave must be bitwise equal.

    python experiments/reliability/resume.py [--short] [--output FILE.json]

Each attempt is a process of its own, `dsmr fit` and then `dsmr fit --resume`. It ends by SIGKILL at a chosen moment:
in a forward or backward pass, in the optimizer, while a checkpoint is written (before the first byte, half way, when
only its new name is missing), while metrics.csv is, inside a validation; or it is asked to stop by a signal. The run
has dropout, transposition, accumulated gradients, a loader process, four epochs, and validations at, before and
within the accumulation of gradients. A full disk is a real one where this may mount one, else a limit on file sizes.
"""

import argparse
import csv
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

import dsmr.checkpoint
import dsmr.data.datamodule
import dsmr.metrics_csv
from dsmr.callbacks import LastCheckpoint
from dsmr.cli import lightning, main
from dsmr.module import RecurrentLM

STEPS = 56
SETTINGS = (
    "--config smoke --trainer.enable_progress_bar false --trainer.log_every_n_steps 1 --data.transpose 3 "
    "--data.num_workers 1 --data.recall.num_train 8 --data.recall.num_validation 2 --model.backbone.d_model 16 "
    "--trainer.accumulate_grad_batches 2 --trainer.val_check_interval 15 --save_every_n_steps 5 "
    f"--sample_every_n_steps 10 --trainer.max_steps {STEPS}"
).split()


@dataclass(frozen=True)
class Moment:
    """When a process ends.

    Attributes:
        place: forward, backward, optimizer, checkpoint, metrics, validation or start.
        number: optimizer steps done, or how many checkpoints, appended rows or validation segments came before.
        share: of a checkpoint or of rows that was written; 1 means all but the file's new name.
        by: SIGKILL, or one that asks.
    """

    place: str
    number: int = 0
    share: float = 0.0
    by: signal.Signals = signal.SIGKILL

    def __str__(self) -> str:
        what = "" if self.place == "start" else f" {self.number}"
        share = f", {self.share:.0%} written" if self.place in ("checkpoint", "metrics") else ""
        return f"{self.by.name} at {self.place}{what}{share}"


MOMENTS = (
    Moment("start"),
    Moment("forward", 0),
    Moment("checkpoint", 0, 0.5),
    Moment("forward", 3),
    Moment("checkpoint", 0, 1.0),
    Moment("backward", 7),
    Moment("validation", 5),
    Moment("optimizer", 8),
    Moment("checkpoint", 1, 0.0),
    Moment("metrics", 0, 0.5),
    Moment("forward", 12, by=signal.SIGTERM),
    Moment("validation", 9, by=signal.SIGUSR1),
    Moment("backward", 16),
    Moment("checkpoint", 0, 0.9),
    Moment("forward", 20, by=signal.SIGINT),
    Moment("validation", 11),
    Moment("optimizer", 24),
    Moment("checkpoint", 0, 1.0),
    Moment("forward", 31),
    Moment("metrics", 0, 0.9),
    Moment("validation", 2),
    Moment("backward", 37, by=signal.SIGUSR1),
    Moment("checkpoint", 0, 0.2),
    Moment("validation", 0, by=signal.SIGTERM),
    Moment("forward", 46),
    Moment("checkpoint", 0, 0.5),
    Moment("optimizer", 48),
    Moment("metrics", 0, 0.1),
    Moment("validation", 1),
    Moment("backward", 52),
    Moment("checkpoint", 0, 0.7),
    Moment("forward", 55),
)
SHORT = (
    Moment("forward", 7),
    Moment("checkpoint", 1, 0.5),
    Moment("validation", 5),
    Moment("forward", 20, by=signal.SIGTERM),
    Moment("validation", 9, by=signal.SIGUSR1),
)


def in_process(work: Callable[[], int], log: Path) -> int:
    """Run in a process of its own; gives its exit status, negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            torch.set_num_threads(1)
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def end_at(moment: Moment) -> None:
    """Let this process end at a moment, from within what happens there."""
    left = [moment]

    def strike() -> None:
        if left:
            os.kill(os.getpid(), left.pop().by)

    if moment.place == "start":
        wrap(LastCheckpoint, "on_train_start", before=lambda *_: strike())
    elif moment.place in ("forward", "backward", "optimizer"):
        name = {
            "forward": "training_step",
            "backward": "on_after_backward",
            "optimizer": "configure_gradient_clipping",
        }

        def at_step(lm: Any, *_: Any, **__: Any) -> None:
            if lm.trainer.global_step == moment.number:
                strike()

        wrap(RecurrentLM, name[moment.place], before=at_step)
    elif moment.place == "validation":
        wrap(RecurrentLM, "validation_step", before=counted(moment.number, strike))
    elif moment.place == "checkpoint":
        due = counted(moment.number, lambda: True)
        whole = dsmr.checkpoint.replacing

        @contextmanager
        def partly(path: Path) -> Iterator[Any]:
            with whole(path) as file:
                yield Partly(file, moment.share, strike) if path.name == "last.ckpt" and due() else file

        dsmr.checkpoint.replacing = partly
    elif moment.place == "metrics":
        due = counted(moment.number, lambda: True)
        text = dsmr.metrics_csv.as_text

        def cut(rows: Any, columns: Any, *, header: bool) -> str:
            given = text(rows, columns, header=header)
            if header or not due():
                return given
            with (lightning_folder() / "metrics.csv").open("a") as file:
                file.write(given[: int(moment.share * len(given))])
            strike()
            return given

        dsmr.metrics_csv.as_text = cut


def lightning_folder() -> Path:
    """The run's folder, of the process that trains in it."""
    return Path(os.environ["DSMR_RELIABILITY_RUN"])


def counted(number: int, then: Callable[[], Any]) -> Callable[..., Any]:
    """Call `then` at the call of that number, from 0."""
    left = [number]

    def count(*_: Any, **__: Any) -> Any:
        left[0] -= 1
        return then() if left[0] == -1 else None

    return count


def wrap(owner: type, name: str, before: Callable[..., None]) -> None:
    """Let something happen before a method."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        before(*arguments, **options)
        return method(*arguments, **options)

    setattr(owner, name, wrapped)


@dataclass
class Partly:
    """A file of which a share is written, down to the disk, before the process ends."""

    file: IO[bytes]
    share: float
    strike: Callable[[], None]

    def write(self, content: memoryview) -> None:
        """Write the share, and end."""
        self.file.write(content[: int(self.share * len(content))])
        self.file.flush()
        os.fsync(self.file.fileno())
        self.strike()


def fit(run: Path, moment: Moment | None = None) -> int:
    """Begin a run, or go on with it, up to a moment."""
    os.environ["DSMR_RELIABILITY_RUN"] = str(run)
    if moment is not None:
        end_at(moment)
    if (run / "last.ckpt").is_file():
        return main(["fit", "--resume", str(run), "--trainer.enable_progress_bar", "false"])
    return main(["fit", *SETTINGS, "--root", str(run.parent), "--name", run.name])


def remains(run: Path) -> dict[str, Any]:
    """All that must be equal: weights, optimizer, memory, place, metrics."""
    last, best = (torch.load(run / name, weights_only=True) for name in ("last.ckpt", "best.ckpt"))
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith("perf/")} for row in csv.DictReader(file)]
    return {
        "weights": last["state_dict"],
        "optimizer": last["optimizer_states"],
        "schedule": last["lr_schedulers"],
        "memory": last["dsmr"]["memory"],
        "random": last["dsmr"]["random"],
        "place": last["MusicData"],
        "best": best["state_dict"],
        "metrics": [row for row in rows if row.keys() != {"epoch", "step"}],
        "samples": sorted((path.name, path.read_bytes()) for path in (run / "samples").glob("*.mid")),
    }


def same(first: Any, second: Any) -> bool:
    """Bitwise equality of nested tensors and values."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names of what is not equal."""
    return [name for name in first if not same(first[name], second[name])]


def readable(run: Path) -> bool:
    """Whether the checkpoints that are there can be read."""
    return all(dsmr.checkpoint.read(path) is not None for path in run.glob("*.ckpt"))


def killed_and_resumed(root: Path, moments: tuple[Moment, ...]) -> dict[str, Any]:
    """The comparison; `failures` names what was not equal, or what did not happen."""
    whole, broken = root / "whole", root / "broken"
    failures = []
    if in_process(lambda: fit(whole), root / "whole.log"):
        return {"cases": 0, "failures": ["the run that was left alone failed"]}
    for moment in moments:
        status = in_process(lambda moment=moment: fit(broken, moment), root / "broken.log")
        expected = -signal.SIGKILL if moment.by == signal.SIGKILL else 128 + moment.by
        if status != expected:
            failures.append(f"{moment}: exit status {status}, not {expected}")
        if not readable(broken):
            failures.append(f"{moment}: a checkpoint cannot be read")
    if in_process(lambda: fit(broken), root / "broken.log"):
        failures.append("the last attempt failed")
    else:
        failures += [f"not equal: {name}" for name in differences(remains(whole), remains(broken))]
    steps = [int(row["step"]) for row in remains(broken)["metrics"] if "train/nll" in row]
    if steps != list(range(STEPS)):
        failures.append("metrics.csv has a gap or a duplicate")
    places = [moment.place for moment in moments]
    return {
        "cases": len(moments),
        "killed": sum(moment.by == signal.SIGKILL for moment in moments),
        "inside_a_checkpoint": places.count("checkpoint"),
        "inside_a_validation": places.count("validation"),
        "failures": failures,
    }


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[str]:
    """A file system of so many MiB in a folder; where none may be mounted, a limit on the size of files."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        try:
            yield "a file system that is full"
        finally:
            subprocess.run(["umount", str(folder)], check=False)
    else:
        yield "a limit on the size of files"


def full_disk(root: Path, room: int) -> dict[str, Any]:
    """A run whose disk fills up stops with one line, keeps its last checkpoint, and goes on when there is room.

    Args:
        root: with the run that was left alone, to compare with.
        room: bytes that are left on the disk.
    """
    failures = []
    disk = root / f"disk{room}"
    run, log = disk / "run", root / f"disk{room}.log"
    with small_disk(disk, 4) as kind:
        if in_process(lambda: fit(run, Moment("forward", 17)), log) != -signal.SIGKILL:
            failures.append("the run was not killed")
        before = (run / "last.ckpt").read_bytes()
        filler = disk / "filler"
        if kind.startswith("a file system"):
            with suppress_full(), filler.open("wb") as file:
                while True:
                    file.write(bytes(4096))
                    file.flush()
            os.truncate(filler, max(filler.stat().st_size - room, 0))
            status = in_process(lambda: fit(run), log)
        else:

            def limited() -> int:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
                return fit(run)

            status = in_process(limited, log)
        last_line = log.read_text().rstrip().splitlines()[-1]
        if status != 2 or not last_line.startswith("dsmr: error: cannot write"):
            failures.append(f"exit status {status}: {last_line}")
        if (run / "last.ckpt").read_bytes() != before:
            failures.append("the last good checkpoint was changed")
        if list(run.glob(".*.partial")):
            failures.append("half a file was left")
        filler.unlink(missing_ok=True)
        if in_process(lambda: fit(run), log):
            failures.append("it does not go on when there is room")
        else:
            failures += [f"not equal: {name}" for name in differences(remains(root / "whole"), remains(run))]
    return {"cases": 1, "kind": kind, "line": last_line.replace(str(root), ""), "failures": failures}


@contextmanager
def suppress_full() -> Iterator[None]:
    """Until no byte fits any more."""
    try:
        yield
    except OSError as error:
        if error.errno != 28:
            raise


def work(root: Path, *, short: bool) -> dict[str, Any]:
    """Both trials, in a folder."""
    os.environ["DSMR_CACHE"] = str(root / "cache")
    os.environ.pop("DSMR_DEBUG", None)
    lightning.quieten()
    return {
        "killed_and_resumed": killed_and_resumed(root, SHORT if short else MOMENTS),
        "disk_full": full_disk(root, 0),
        "disk_without_room_for_a_checkpoint": full_disk(root, 150_000),
    }


def cli() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--root", type=Path, help="folder to keep; otherwise a temporary one")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        result = work(root.resolve(), short=options.short)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 1 if any(trial["failures"] for trial in result.values()) else 0


if __name__ == "__main__":
    raise SystemExit(cli())
