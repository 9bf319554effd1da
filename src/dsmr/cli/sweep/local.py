"""The trials of a sweep on this machine, one after another, each in a process of its own; what is done stays done."""

import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dsmr import UserError
from dsmr.cli.sweep.spec import Sweep, Trial
from dsmr.cli.sweep.state import BEGUN, DONE, FAILED, check_same, read_state, write_state
from dsmr.results.run_files import BEST_FILE, LAST_FILE
from dsmr.results.runs import read_run

LOGS = "logs"
SECONDS_TO_SAVE = 300.0
MISTAKE = "dsmr: error: "
CONTROL = re.compile(r"\r|\x1b\[[0-9;]*[A-Za-z]")  # of progress bars


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
        UserError: the folder holds the same trials with other settings, or another sweep runs there.
        Stopped: a trial was stopped by a signal; it goes on with the next call.
    """
    folder = root / sweep.name
    try:
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder / LOGS} ({error.strerror or error}); choose another --root") from error
    for trial in trials:
        check_same(trial, folder / trial.name)
    try:
        with FileLock(folder / ".lock", timeout=0):
            return [
                one(trial, folder, tell, f"[{number} of {len(trials)}] {trial.name}")
                for number, trial in enumerate(trials, start=1)
            ]
    except Timeout:
        raise UserError(f"another dsmr sweep runs in {folder}; wait for it, or choose another --root") from None


def one(trial: Trial, folder: Path, tell: Callable[[str], None], label: str) -> Outcome:
    """Run a trial, or go on with it, unless it is done."""
    run, log = folder / trial.name, folder / LOGS / f"{trial.name}.log"
    state = read_state(run)
    if state is not None and state["status"] == DONE:
        figures = figures_of(run)
        tell(f"{label}: done before, {summary(figures)}")
        return Outcome(trial, DONE, figures)
    lock = folder / LOGS / f".{trial.name}.lock"
    if not is_free(lock):
        tell(f"{label}: FAILED: {taken(lock)}")
        return Outcome(trial, FAILED, {}, taken(lock))
    goes_on = (run / LAST_FILE).is_file()
    if goes_on:
        arguments = ["fit", "--resume", str(run)]
        if state is not None and state.get("fingerprint") is None:  # its settings are the run's own, not today's
            trial = replace(trial, fingerprint=None)
    else:
        for name in (BEST_FILE, "metrics.csv"):  # of an attempt that saved nothing to go on from
            (run / name).unlink(missing_ok=True)
        arguments = ["fit", *trial.arguments, "--root", str(folder), "--name", trial.name]
    write_state(run, trial, BEGUN)
    tell(f"{label}: {'goes on' if goes_on else 'begins'}, see {log}")
    began = time.monotonic()
    message = failure(in_child(arguments, log, lock), log)
    if message is not None:
        write_state(run, trial, FAILED, message)
        tell(f"{label}: FAILED: {message}")
        return Outcome(trial, FAILED, {}, message)
    write_state(run, trial, DONE)
    figures = figures_of(run)
    tell(f"{label}: {summary(figures)}, {(time.monotonic() - began) / 60:.1f} min")
    return Outcome(trial, DONE, figures)


def is_free(lock: Path) -> bool:
    """Wait until no process trains a trial, so that its checkpoints stand; False where one does for long."""
    try:
        with FileLock(lock, timeout=SECONDS_TO_SAVE):
            return True
    except Timeout:
        return False


def taken(lock: Path | str) -> str:
    """What to do where a trial's lock does not become free."""
    return f"another process has been training this trial for long; stop it, or delete {lock}"


def failure(status: int, log: Path) -> str | None:
    """Why a trial failed; None where it did not.

    Raises:
        Stopped: it was asked to stop.
    """
    from dsmr.training.callbacks.stop_signals import STOPPING

    if status == 0:
        return None
    number = -status if status < 0 else status - 128
    if number in STOPPING:
        raise Stopped(128 + number)
    names = {int(known): known.name for known in signal.Signals}
    if status < 0 or number in names:
        return f"killed by signal {number} ({names.get(number, 'no name')}), see {log}"
    return last_line(log)


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


def figures_of(run: Path) -> dict[str, Any]:
    """Of a run's table; none where it logged elsewhere."""
    try:
        return read_run(run).metrics
    except Exception:  # the report says why a run cannot be read; the trial has ended all the same
        return {}


def summary(figures: dict[str, Any]) -> str:
    """A trial's outcome in a line."""
    words = {"val/perplexity": "perplexity {:.3f}", "val/nats_per_note": "{:.3f} nats per note"}
    known = [text.format(figures[key]) for key, text in words.items() if math.isfinite(figures.get(key, math.nan))]
    return ", ".join(known) or "trained, never validated"


def last_line(log: Path) -> str:
    """What a trial said last: its error, where progress bars may stand before and after."""
    text = CONTROL.sub("\n", log.read_bytes().decode(errors="replace"))
    said = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.partition(MISTAKE)[2] for line in said if MISTAKE in line]
    return errors[-1] if errors else said[-1] if said else f"it said nothing, see {log}"
