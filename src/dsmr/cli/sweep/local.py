"""Run the trials of a sweep on this machine, each in its own process; finished trials are skipped."""

import math
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
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
    """Outcome of a trial."""

    trial: Trial
    status: str  # done or failed
    metrics: dict[str, Any]  # of its best validation, and its performance
    message: str = ""  # last line of a failed trial's log


class Stopped(Exception):  # noqa: N818  not an error
    """Raised when a trial was stopped by a signal; carries the exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def run_trials(
    sweep: Sweep, trials: Sequence[Trial], root: Path, tell: Callable[[str], None], num_jobs: int = 1
) -> list[Outcome]:
    """Run the trials that are not done yet, in a folder below `root`, and call `tell` with lines of progress.

    A failed trial does not stop the others. Raises Stopped if a signal stopped a trial; the next call resumes it.
    """
    folder = root / sweep.name
    try:
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder / LOGS} ({error.strerror or error}); choose another --root") from error
    for trial in trials:
        check_same(trial, folder / trial.name)
    stop = threading.Event()

    def work(number: int, trial: Trial) -> Outcome:
        if stop.is_set():
            raise CancelledError
        try:
            return run_trial(trial, folder, tell, f"[{number} of {len(trials)}] {trial.name}")
        except BaseException:
            stop.set()  # here, before this thread takes the next trial
            raise

    try:
        with FileLock(folder / ".lock", timeout=0), ThreadPoolExecutor(num_jobs) as pool:
            futures = [pool.submit(work, number, trial) for number, trial in enumerate(trials, start=1)]
            try:
                return [future.result() for future in futures]
            finally:
                stop.set()  # after Ctrl-C: wait until the running trials have saved, and start no other
    except Timeout:
        raise UserError(f"another dsmr sweep runs in {folder}; wait for it, or choose another --root") from None


def run_trial(trial: Trial, folder: Path, tell: Callable[[str], None], label: str) -> Outcome:
    """Start or resume a trial, unless it is done."""
    run, log = folder / trial.name, folder / LOGS / f"{trial.name}.log"
    state = read_state(run)
    if state is not None and state["status"] == DONE:
        metrics = run_metrics(run)
        tell(f"{label}: done before, {summarize(metrics)}")
        return Outcome(trial, DONE, metrics)
    lock = folder / LOGS / f".{trial.name}.lock"
    try:  # wait until no process trains this trial, so that its checkpoints are complete
        with FileLock(lock, timeout=SECONDS_TO_SAVE):
            pass
    except Timeout:
        tell(f"{label}: FAILED: {lock_message(lock)}")
        return Outcome(trial, FAILED, {}, lock_message(lock))
    is_resumed = (run / LAST_FILE).is_file()
    if is_resumed:
        arguments = ["fit", "--resume", str(run)]
        if state is not None and state.get("fingerprint") is None:  # of a version that kept none
            trial = replace(trial, fingerprint=None)
    else:
        for name in (BEST_FILE, "metrics.csv"):  # of an attempt that saved no checkpoint
            (run / name).unlink(missing_ok=True)
        arguments = ["fit", *trial.arguments, "--root", str(folder), "--name", trial.name]
    write_state(run, trial, BEGUN)
    tell(f"{label}: {'resumes' if is_resumed else 'starts'}, log in {log}")
    began = time.monotonic()
    message = failure_message(run_child(arguments, log, lock), log)
    if message is not None:
        write_state(run, trial, FAILED, message)
        tell(f"{label}: FAILED: {message}")
        return Outcome(trial, FAILED, {}, message)
    write_state(run, trial, DONE)
    metrics = run_metrics(run)
    tell(f"{label}: {summarize(metrics)}, {(time.monotonic() - began) / 60:.1f} min")
    return Outcome(trial, DONE, metrics)


def lock_message(lock: Path | str) -> str:
    """Return the message for a trial whose lock stays taken."""
    return f"another process still trains this trial; stop it, or delete {lock}"


def failure_message(status: int, log: Path) -> str | None:
    """Return the reason of a failure; None for exit status 0. Raise Stopped if a signal stopped the trial."""
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


def run_child(arguments: Sequence[str], log: Path, lock: Path) -> int:
    """Run `dsmr` in its own process, which stops when this one ends, and return its exit status."""
    command = [sys.executable, "-m", "dsmr.cli.sweep.child", str(lock), *arguments]
    with (
        log.open("ab") as output,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT) as child,
    ):
        try:
            return child.wait()
        except KeyboardInterrupt:  # the child got the signal as well
            with suppress(KeyboardInterrupt):
                child.wait()
            raise


def run_metrics(run: Path) -> dict[str, Any]:
    """Return the metrics of a run's table; empty if it logged elsewhere."""
    try:
        return read_run(run).metrics
    except Exception:  # the report names the reason; the trial is done all the same
        return {}


def summarize(metrics: dict[str, Any]) -> str:
    """Return a trial's outcome in one line."""
    words = {"val/perplexity": "perplexity {:.3f}", "val/nats_per_note": "{:.3f} nats per note"}
    known = [text.format(metrics[key]) for key, text in words.items() if math.isfinite(metrics.get(key, math.nan))]
    return ", ".join(known) or "trained, never validated"


def last_line(log: Path) -> str:
    """Return a log's last error message or last line; progress bars may surround it."""
    text = CONTROL.sub("\n", log.read_bytes().decode(errors="replace"))
    said = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.partition(MISTAKE)[2] for line in said if MISTAKE in line]
    return errors[-1] if errors else said[-1] if said else f"no output, see {log}"
