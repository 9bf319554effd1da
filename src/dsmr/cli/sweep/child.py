"""One trial in a process of its own: `dsmr fit`, which saves and stops when the sweep that began it has gone.

python -m dsmr.cli.sweep.child LOCK fit ...
"""

import os
import signal
import sys
import threading

from filelock import FileLock, Timeout

from dsmr.cli import fail, main
from dsmr.cli.sweep.local import SECONDS_TO_SAVE, taken


def stop_with_parent() -> None:
    """Ask this process to stop once nobody holds the other end of its standard input."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    lock = FileLock(sys.argv[1])
    if os.environ.get("LOCAL_RANK", "0") == "0":  # which starts the processes of other devices with this same command
        try:  # the trial of a sweep that was killed may still be saving
            lock.acquire(timeout=SECONDS_TO_SAVE)
        except Timeout:
            sys.exit(fail(taken(sys.argv[1])))
        threading.Thread(target=stop_with_parent, daemon=True).start()
    sys.exit(main(sys.argv[2:]))
