"""Compare a run that is killed again and again with the same run left alone: their results must be bitwise equal.

    python tests/trials/resume.py [--short] [--output FILE.json] [--root FOLDER]

Each attempt is its own process, `dsmr fit` and then `dsmr fit --resume`. It ends by SIGKILL at a chosen moment: in a
forward or backward pass, in the optimizer, while a checkpoint is written (before the first byte, half way, before the
rename), while metrics.csv is written, inside a validation; or a signal stops it. The run
has dropout, transposition, accumulated gradients, a loader process, four epochs, and validations at, before and
within the accumulation of gradients. A full disk is a mounted one where permitted, otherwise a limit on file sizes.
"""

import csv
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from processes import counted, fill, in_process, last_line, run, small_disk, wrap

import dsmr.training.checkpoint
import dsmr.training.csv_logger
from dsmr.cli import main
from dsmr.cli.lightning_cli import quieten
from dsmr.results.run_files import read_checkpoint
from dsmr.training.callbacks import LastCheckpoint
from dsmr.training.module import RecurrentLM

STEPS = 56
SETTINGS = (
    "--config smoke --trainer.enable_progress_bar false --trainer.log_every_n_steps 1 --data.transpose 3 "
    "--data.num_workers 1 --data.recall.num_train 8 --data.recall.num_validation 2 --model.backbone.d_model 16 "
    "--trainer.accumulate_grad_batches 2 --trainer.val_check_interval 15 --save_every_n_steps 5 "
    f"--sample_every_n_steps 10 --trainer.max_steps {STEPS}"
).split()


@dataclass(frozen=True)
class Moment:
    """Moment at which a process ends.

    Attributes:
        place: forward, backward, optimizer, checkpoint, metrics, validation, start (of training) or begin (of its
            first batch).
        number: optimizer steps done, or how many checkpoints, appended rows or validation segments came before.
        share: share of a checkpoint or of rows that was written; 1 means all but the rename.
        by: the signal.
    """

    place: str
    number: int = 0
    share: float = 0.0
    by: signal.Signals = signal.SIGKILL

    def __str__(self) -> str:
        what = "" if self.place in ("start", "begin") else f" {self.number}"
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
    Moment("begin", by=signal.SIGTERM),
    Moment("validation", 11),
    Moment("optimizer", 24),
    Moment("checkpoint", 0, 1.0),
    Moment("forward", 30),
    Moment("begin", by=signal.SIGINT),
    Moment("begin"),
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
EPOCH_ENDS = ["--trainer.val_check_interval", "1.0", "--trainer.check_val_every_n_epoch", "1"]
MOMENTS_OF_EPOCHS = (
    Moment("forward", 7),
    Moment("checkpoint", 0, 0.5),
    Moment("validation", 3),
    Moment("begin", by=signal.SIGTERM),
    Moment("begin"),
    Moment("forward", 18),
    Moment("forward", 20),
    Moment("validation", 9),
    Moment("validation", 5, by=signal.SIGUSR1),
    Moment("begin", by=signal.SIGUSR1),
    Moment("checkpoint", 0, 0.5),
    Moment("checkpoint", 0, 1.0),
    Moment("forward", 40, by=signal.SIGTERM),
    Moment("forward", 47),
    Moment("validation", 12, by=signal.SIGTERM),
    Moment("validation", 2),
    Moment("begin", by=signal.SIGTERM),
    Moment("forward", 50),
)
SHORT = (
    Moment("forward", 7),
    Moment("checkpoint", 1, 0.5),
    Moment("validation", 5),
    Moment("forward", 15),
    Moment("begin", by=signal.SIGTERM),
    Moment("forward", 20, by=signal.SIGTERM),
    Moment("validation", 9, by=signal.SIGUSR1),
)


def end_at(moment: Moment) -> None:
    """End this process at a moment, from within the operation."""
    left = [moment]

    def strike() -> None:
        if left:
            os.kill(os.getpid(), left.pop().by)

    if moment.place == "begin":
        wrap(LastCheckpoint, "on_train_batch_start", before=lambda *_: strike())
    elif moment.place == "start":
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
        whole = dsmr.training.checkpoint.atomic_write

        @contextmanager
        def partly(path: Path) -> Iterator[Any]:
            with whole(path) as file:
                yield Partly(file, moment.share, strike) if path.name == "last.ckpt" and due() else file

        dsmr.training.checkpoint.atomic_write = partly
    elif moment.place == "metrics":
        due = counted(moment.number, lambda: True)
        text = dsmr.training.csv_logger.rows_to_csv

        def cut(rows: Any, columns: Any, *, header: bool) -> str:
            given = text(rows, columns, header=header)
            if header or not due():
                return given
            with (lightning_folder() / "metrics.csv").open("a") as file:
                file.write(given[: int(moment.share * len(given))])
            strike()
            return given

        dsmr.training.csv_logger.rows_to_csv = cut


def lightning_folder() -> Path:
    """Return the run's folder in the training process."""
    return Path(os.environ["DSMR_RELIABILITY_RUN"])


@dataclass
class Partly:
    """A file of which a share is written and flushed to disk before the process ends."""

    file: IO[bytes]
    share: float
    strike: Callable[[], None]

    def write(self, content: memoryview) -> None:
        """Write the share, then end the process."""
        self.file.write(content[: int(self.share * len(content))])
        self.file.flush()
        os.fsync(self.file.fileno())
        self.strike()


def fit(run: Path, moment: Moment | None = None, options: Sequence[str] = ()) -> int:
    """Start or resume a run, up to a moment."""
    os.environ["DSMR_RELIABILITY_RUN"] = str(run)
    if moment is not None:
        end_at(moment)
    if (run / "last.ckpt").is_file():
        return main(["fit", "--resume", str(run), "--trainer.enable_progress_bar", "false"])
    return main(["fit", *SETTINGS, *options, "--root", str(run.parent), "--name", run.name])


def remains(run: Path) -> dict[str, Any]:
    """Return everything that must be equal: weights, optimizer, memory, position, metrics."""
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
    """Compare nested tensors and values bitwise."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return the names of the parts that differ."""
    return [name for name in first if not same(first[name], second[name])]


def readable(run: Path) -> bool:
    """Return True if all existing checkpoints can be read."""
    try:
        return all(read_checkpoint(path) for path in run.glob("*.ckpt"))
    except ValueError:
        return False


def saved_step(run: Path) -> int:
    """Return the optimizer steps of the last checkpoint."""
    return int(read_checkpoint(run / "last.ckpt")["global_step"])


def last_lines(root: Path) -> str:
    """Return the last two lines of the killed process's log."""
    return "\n".join((root / "broken.log").read_text().rstrip().splitlines()[-2:])


def killed_and_resumed(root: Path, moments: Sequence[Moment], options: Sequence[str] = ()) -> dict[str, Any]:
    """Run the comparison; `failures` names parts that differ and moments that did not occur."""
    root.mkdir(exist_ok=True)
    whole, broken = root / "whole", root / "broken"
    failures = []
    if in_process(lambda: fit(whole, None, options), root / "whole.log"):
        return {"cases": 0, "failures": ["the run that was left alone failed"]}
    for moment in moments:
        status = in_process(lambda moment=moment: fit(broken, moment, options), root / "broken.log")
        expected = -signal.SIGKILL if moment.by == signal.SIGKILL else 128 + moment.by
        if status != expected:
            failures.append(f"{moment}: exit status {status}, not {expected}")
        if not readable(broken):
            failures.append(f"{moment}: a checkpoint cannot be read")
        elif moment.by != signal.SIGKILL and f"stopped after step {saved_step(broken):,} (" not in last_lines(root):
            failures.append(f"{moment}: last.ckpt is not of the step that it stopped after")
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


def full_disk(root: Path, room: int) -> dict[str, Any]:
    """Check that a run on a full disk stops with one line, keeps its last checkpoint, and resumes once there is room.

    Args:
        root: folder with the undisturbed run.
        room: bytes left on the disk.
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
            fill(filler, room)
            status = in_process(lambda: fit(run), log)
        else:

            def limited() -> int:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
                return fit(run)

            status = in_process(limited, log)
        line = last_line(log)
        if status != 2 or not line.startswith("dsmr: error: cannot write"):
            failures.append(f"exit status {status}: {line}")
        if (run / "last.ckpt").read_bytes() != before:
            failures.append("the last good checkpoint was changed")
        if list(run.glob(".*.partial")):
            failures.append("half a file was left")
        filler.unlink(missing_ok=True)
        if in_process(lambda: fit(run), log):
            failures.append("it does not go on when there is room")
        else:
            failures += [f"not equal: {name}" for name in differences(remains(root / "whole"), remains(run))]
    return {"cases": 1, "kind": kind, "line": line.replace(str(root), ""), "failures": failures}


def work(root: Path, *, short: bool) -> dict[str, Any]:
    """Run all trials in a folder."""
    os.environ["DSMR_CACHE"] = str(root / "cache")
    quieten()
    by_epochs = (
        {} if short else {"killed_by_epochs": killed_and_resumed(root / "epochs", MOMENTS_OF_EPOCHS, EPOCH_ENDS)}
    )
    return {
        "killed_and_resumed": killed_and_resumed(root, SHORT if short else MOMENTS),
        **by_epochs,
        "disk_full": full_disk(root, 0),
        "disk_without_room_for_a_checkpoint": full_disk(root, 150_000),
    }


if __name__ == "__main__":
    raise SystemExit(run(__doc__, work))
