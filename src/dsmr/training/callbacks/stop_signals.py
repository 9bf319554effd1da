"""Signals that ask training to stop: from a person, a batch system, or a machine that is shutting down."""

import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

# Windows has no SIGUSR1
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))


class Stopped(BaseException):
    """Training was asked to end early, and has been saved; exit status 128 + the signal's number, 0 for a limit."""

    def __init__(self, reason: str, status: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.status = reason, status


class StopSignals:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C, so that the step can be finished; a second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """Replace the handlers of the signals, Lightning's included; only the main thread can."""
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._previous[number] = signal.signal(number, self._note)

    def leave(self) -> None:
        """Restore the previous handlers."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
        write_stderr(f"{signal_name(number)}: finishing the step, then saving{again}")
        self.received = number


@rank_zero_only
def write_stderr(line: str) -> None:
    """Write a line to stderr from the first process; not by `print`, which a signal handler may interrupt."""
    os.write(2, f"{line}\n".encode())


def signal_name(number: int) -> str:
    """Return the usual name of a signal: `Ctrl-C`, or `SIGTERM`."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
