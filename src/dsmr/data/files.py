"""Crash-safe writes: after an error, a kill or a power cut a file is either the old one or the new one, and whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that replaces `path` when the block ends without an error.

    After an error the old file is unchanged. A kill leaves a hidden `.NAME.partial`, which the next write overwrites.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            # Before the rename: otherwise a power cut may keep the new name but lose the bytes behind it.
            sync_file(file)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)  # the rename itself is an entry of the folder, and reaches the disk with it


def sync_file(file: IO[bytes] | IO[str]) -> None:
    """Flush a file's buffers to the disk."""
    file.flush()  # Python's buffer, then the system's
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (new, renamed and deleted names) to the disk; a no-op where that is unsupported."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
