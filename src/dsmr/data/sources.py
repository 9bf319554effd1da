"""Shared parts of all sources of MIDI files: pieces with their splits, and readers of untrusted folders and zips.

A zip is read in place, without unpacking; files are read up to a size limit.
"""

import re
import stat
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

from dsmr import UserError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
DRIVE = re.compile(r"[A-Za-z]:[\\/]")
MAX_FILE_BYTES = 16 * 2**20
MAX_UNPACKED_BYTES = 2 * 2**30  # all members together; MAESTRO v3.0.0 has 85 MB


class Refused(Exception):  # noqa: N818 (a verdict on one file; the others are kept)
    """A file that cannot be used. The message is the reason, without the file's name."""


@dataclass(frozen=True)
class Entry:
    """One piece of a source; its name is its path there, and unique."""

    name: str
    split: Split


@dataclass
class FolderReader:
    """Files in a folder and all folders below it; `advice` ends every error message."""

    path: Path
    advice: str

    @cached_property
    def names(self) -> list[str]:
        """Names of all files and folders, with `/` between the parts."""
        return [path.relative_to(self.path).as_posix() for path in self.path.rglob("*")]

    def has(self, name: str) -> bool:
        """Return True if there is such a file; raises `UserError` if it is a link that leads out of the folder."""
        if not (self.path / name).resolve().is_relative_to(self.path.resolve()):
            raise UserError(f"{self.path}: {name!r} leads out of the folder; {self.advice}")
        return (self.path / name).is_file()

    def read(self, name: str) -> bytes:
        """Return the content of a file; raises `Refused` if it cannot be read or is larger than 16 MiB."""
        path = self.path / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # reading a FIFO or a device may block for ever
                raise Refused("not a regular file")
            with path.open("rb") as file:
                return check_size(file.read(MAX_FILE_BYTES + 1))
        except OSError as error:
            raise Refused(f"cannot be read: {error.strerror}") from error


@dataclass
class ZipReader:
    """Members of a zip; `advice` ends every error message."""

    path: Path
    advice: str

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "advice": self.advice}  # worker processes get copies; an open file has none

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{self.path} is not a readable zip ({error}); {self.advice}") from error

    @cached_property
    def names(self) -> list[str]:
        """Names of all members, including folders.

        Raises:
            UserError: the zip is not readable, a name leads out of it, a member is a link, or it is too large.
        """
        for info in self._zip.infolist():
            check_inside(info.filename, str(self.path), self.advice)
            if stat.S_ISLNK(info.external_attr >> 16):  # the upper 16 bits hold the Unix file mode
                raise UserError(f"{self.path}: member {info.filename!r} is a link; {self.advice}")
        unpacked = sum(info.file_size for info in self._zip.infolist())
        if unpacked > MAX_UNPACKED_BYTES:
            raise UserError(
                f"{self.path} would unpack to {unpacked / 2**30:,.1f} GiB, more than "
                f"{MAX_UNPACKED_BYTES / 2**30:g}; {self.advice}"
            )
        return list(dict.fromkeys(self._zip.namelist()))

    @cached_property
    def _members(self) -> dict[str, str]:
        """Map normalised names to members: `a/b.mid` to a member stored as `./a//b.mid`."""
        return {str(PurePosixPath(name)): name for name in reversed(self.names)}

    def has(self, name: str) -> bool:
        """Return True if there is such a member."""
        return name in self._members

    def read(self, name: str) -> bytes:
        """Return the content of a member; raises `Refused` if it is damaged or larger than 16 MiB."""
        try:
            with self._zip.open(self._members.get(name, name)) as file:
                # The directory of a zip bomb lies about sizes, so one byte more than allowed is read and counted.
                return check_size(file.read(MAX_FILE_BYTES + 1))
        except (zipfile.BadZipFile, KeyError, OSError, EOFError, RuntimeError, zlib.error) as error:
            raise Refused(f"cannot be read from the zip: {error}") from error


def open_reader(path: Path, advice: str) -> FolderReader | ZipReader:
    """Open a folder or a zip."""
    return FolderReader(path, advice) if path.is_dir() else ZipReader(path, advice)


def check_inside(name: str, where: str, advice: str) -> None:
    """Raise `UserError` if a name is absolute or climbs out of its collection."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or name.startswith(("/", "\\")) or DRIVE.match(name):
        raise UserError(f"{where}: the path {name!r} leads out of the collection; {advice}")


def check_size(content: bytes) -> bytes:
    """Return the content; raises `Refused` if it is larger than any piece of music needs."""
    if len(content) > MAX_FILE_BYTES:
        raise Refused(f"larger than {MAX_FILE_BYTES // 2**20} MiB")
    return content
