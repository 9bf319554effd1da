"""The trials of a sweep on this machine, one after another, each in a process of its own; what is done stays done."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from dsmr.checkpoint import BEST, LAST
from dsmr.cli.sweep.spec import Sweep, Trial
from dsmr.files import replacing
from dsmr.report.collect import read_run

STATE, LOGS = "trial.json", "logs"
BEGUN, DONE, FAILED = "begun", "done", "failed"


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        trial: which one.
        status: done or failed.
        figures: of its best validation, and of its performance.
        message: the last line of one that failed.
    """

    trial: Trial
    status: str
    figures: dict[str, Any]
    message: str = ""


class Stopped(Exception):  # noqa: N818  no mistake
    """A trial was asked to stop; carries the exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def run_all(sweep: Sweep, trials: Sequence[Trial], root: Path, tell: Callable[[str], None]) -> list[Outcome]:
    """Run the trials that are not done yet; a failed one is told and does not stop the others.

    Args:
        sweep: its name is that of the folder.
        trials: to run.
        root: of the sweep's folder.
        tell: called with a line for every trial.

    Raises:
        ValueError: the folder holds the same trials with other options, or another sweep runs there.
        Stopped: a trial was stopped by a signal; it goes on with the next call.
    """
    folder = root / sweep.name
    try:
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make {folder / LOGS} ({error.strerror or error}); choose another --root") from error
    for trial in trials:
        check_same(trial, folder / trial.name)
    try:
        with FileLock(folder / ".lock", timeout=0):
            return [
                one(trial, folder, tell, f"[{number} of {len(trials)}] {trial.name}")
                for number, trial in enumerate(trials, start=1)
            ]
    except Timeout:
        raise ValueError(f"another dsmr sweep runs in {folder}; wait for it, or choose another --root") from None


def check_same(trial: Trial, run: Path) -> None:
    """Refuse a folder whose trial was begun with other options.

    Raises:
        ValueError: naming what differs.
    """
    state = read_state(run)
    if state is None:
        if (run / LAST).is_file():
            raise ValueError(f"{run} holds a run that no sweep began; choose another --root, or move it away")
        return
    before, now = state["arguments"], list(trial.arguments)
    if before != now:
        changed = [a for a in now if a not in before] or [a for a in before if a not in now] or now
        raise ValueError(
            f"{run} was begun with other options ({' '.join(changed)} differs); choose another --root, or delete it"
        )


def one(trial: Trial, folder: Path, tell: Callable[[str], None], label: str) -> Outcome:
    """Run a trial, or go on with it, unless it is done."""
    run, log = folder / trial.name, folder / LOGS / f"{trial.name}.log"
    state = read_state(run)
    if state is not None and state["status"] == DONE:
        figures = figures_of(run)
        tell(f"{label}: done before, {summary(figures)}")
        return Outcome(trial, DONE, figures)
    goes_on = (run / LAST).is_file()
    if goes_on:
        arguments = ["fit", "--resume", str(run)]
    else:
        for name in (BEST, "metrics.csv"):  # of an attempt that saved nothing to go on from
            (run / name).unlink(missing_ok=True)
        arguments = ["fit", *trial.arguments, "--root", str(folder), "--name", trial.name]
    write_state(run, trial, BEGUN)
    tell(f"{label}: {'goes on' if goes_on else 'begins'}, see {log}")
    began = time.monotonic()
    status = in_child(arguments, log, folder / LOGS / f".{trial.name}.lock")
    if status > 128 or status < 0:
        raise Stopped(status if status > 0 else 128 - status)
    if status:
        message = last_line(log)
        write_state(run, trial, FAILED, message)
        tell(f"{label}: FAILED: {message}")
        return Outcome(trial, FAILED, {}, message)
    write_state(run, trial, DONE)
    figures = figures_of(run)
    tell(f"{label}: {summary(figures)}, {(time.monotonic() - began) / 60:.1f} min")
    return Outcome(trial, DONE, figures)


def in_child(arguments: Sequence[str], log: Path, lock: Path) -> int:
    """Exit status of `dsmr` in a process of its own, which stops when this one is gone."""
    command = [sys.executable, "-m", "dsmr.cli.sweep.child", str(lock), *arguments]
    with (
        log.open("ab") as output,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT) as child,
    ):
        try:
            return child.wait()
        except KeyboardInterrupt:  # which the child has heard as well
            with suppress(KeyboardInterrupt):
                child.wait()
            raise


def read_state(run: Path) -> dict[str, Any] | None:
    """What is known of a trial; None where it has not begun.

    Raises:
        ValueError: the file is damaged.
    """
    path = run / STATE
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert {"status", "arguments"} <= state.keys()
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete {run} to run the trial again") from error
    return state


def write_state(run: Path, trial: Trial, status: str, message: str = "") -> None:
    """Keep what is known of a trial."""
    run.mkdir(parents=True, exist_ok=True)
    state = {"status": status, "values": trial.values, "arguments": list(trial.arguments), "message": message}
    with replacing(run / STATE) as file:
        file.write((json.dumps(state, indent=2) + "\n").encode())


def figures_of(run: Path) -> dict[str, Any]:
    """Of a run's table; none where it logged elsewhere."""
    try:
        return read_run(run).figures
    except (OSError, ValueError, KeyError, yaml.YAMLError):
        return {}


def summary(figures: dict[str, Any]) -> str:
    """A trial's outcome in a line."""
    words = {"val/perplexity": "perplexity {:.3f}", "val/nats_per_note": "{:.3f} nats per note"}
    known = [text.format(figures[key]) for key, text in words.items() if math.isfinite(figures.get(key, math.nan))]
    return ", ".join(known) or "trained, never validated"


def last_line(log: Path) -> str:
    """What a trial said last."""
    text = log.read_bytes().decode(errors="replace").replace("\r", "\n").rstrip()
    return text.rpartition("\n")[2].removeprefix("dsmr: error: ")
