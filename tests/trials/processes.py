"""Helpers of the trials: child processes, full disks, and a common command line."""

import argparse
import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def in_process(work: Callable[[], int], log: Path) -> int:
    """Run `work` in its own process and return its exit status, negative for the signal that ended it."""
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


def counted(number: int, then: Callable[[], Any]) -> Callable[..., Any]:
    """Return a function that calls `then` at its call with this number, counted from 0."""
    left = [number]

    def count(*_: Any, **__: Any) -> Any:
        left[0] -= 1
        return then() if left[0] == -1 else None

    return count


def wrap(owner: type, name: str, before: Callable[..., None]) -> None:
    """Call `before` ahead of a method."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        before(*arguments, **options)
        return method(*arguments, **options)

    setattr(owner, name, wrapped)


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[str]:
    """Mount a small file system on a folder; yields a description, which says if mounting is not permitted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        try:
            yield "a file system that is full"
        finally:
            subprocess.run(["umount", str(folder)], check=False)
    else:
        yield "a limit on the size of files"


def fill(filler: Path, room: int = 0) -> None:
    """Fill a disk with a file, except for `room` bytes."""
    try:
        with filler.open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    os.truncate(filler, max(filler.stat().st_size - room, 0))


def last_line(log: Path) -> str:
    """Return the last line of a log."""
    return log.read_text(encoding="utf-8").rstrip().rpartition("\n")[2]


def run(description: str | None, work: Callable[..., dict[str, Any]]) -> int:
    """Run trials from the command line and return an exit status, 0 if nothing failed.

    Args:
        description: of the script.
        work: called with a folder and `short`; returns `cases` and `failures` by trial.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer cases, in seconds")
    parser.add_argument("--root", type=Path, help="folder to keep; otherwise a temporary one")
    parser.add_argument("--output", type=Path, help="result as JSON")
    options = parser.parse_args()
    os.environ.pop("DSMR_DEBUG", None)
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        result = work(root.resolve(), short=options.short)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 1 if any(trial["failures"] for trial in result.values()) else 0
