"""Being asked to stop: by a person, a batch system or a power cut with a warning."""

import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

STOPPING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
)  # Windows has no SIGUSR1


class Stopped(BaseException):
    """Training was asked to end early, and has been saved.

    Args:
        reason: who asked.
        status: the exit status that says so, 128 + the signal's number; 0 where the run's own limit ended it.
    """

    def __init__(self, reason: str, status: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.status = reason, status


class StopSignals:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C, so that the step can be finished; a second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the signals over, Lightning's own handlers included; only a main thread can."""
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._previous[number] = signal.signal(number, self._note)

    def leave(self) -> None:
        """Give them back."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
        say(f"{describe(number)}: finishing the step, then saving{again}")
        self.received = number


@rank_zero_only
def say(line: str) -> None:
    """Tell it once, not by each process; a handler may interrupt a print, and must not print itself."""
    os.write(2, f"{line}\n".encode())


def describe(number: int) -> str:
    """What a person calls a signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
