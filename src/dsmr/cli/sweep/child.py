"""Run one trial in its own process: `dsmr fit`, which saves and stops when the sweep that started it ends.

python -m dsmr.cli.sweep.child LOCK fit ...
"""

import os
import signal
import sys
import threading

from filelock import FileLock, Timeout

from dsmr.cli import fail, main
from dsmr.cli.sweep.local import SECONDS_TO_SAVE, lock_message


def stop_with_parent() -> None:
    """Ask this process to stop once the other end of its standard input is closed."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    lock = FileLock(sys.argv[1])
    if os.environ.get("LOCAL_RANK", "0") == "0":  # Lightning starts the other ranks with this command
        try:  # the trial of a killed sweep may still be saving
            lock.acquire(timeout=SECONDS_TO_SAVE)
        except Timeout:
            sys.exit(fail(lock_message(sys.argv[1])))
        threading.Thread(target=stop_with_parent, daemon=True).start()
    sys.exit(main(sys.argv[2:]))
