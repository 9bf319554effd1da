"""Read an untrusted zip in place: nothing is unpacked, and names that lead out of it are refused."""

import re
import stat
import zipfile
import zlib
from functools import cached_property
from pathlib import Path, PurePosixPath

from dsmr.data.errors import DataError, Refused

DRIVE = re.compile(r"[A-Za-z]:[\\/]")
MAX_FILE_BYTES = 16 * 2**20
MAX_UNPACKED_BYTES = 2 * 2**30  # of all members; MAESTRO v3.0.0 has 85 MB


class ZipReader:
    """Members of a zip; picklable, since worker processes read from it.

    Args:
        path: the zip.
        advice: what to do where the zip cannot be used.
    """

    def __init__(self, path: Path, advice: str) -> None:
        self.path, self.advice = path, advice

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "advice": self.advice}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{self.path} is not a readable zip ({error}); {self.advice}") from error

    @cached_property
    def names(self) -> list[str]:
        """Names of all members, folders included.

        Raises:
            DataError: it is not a readable zip, a name leads out, a member is a link, or all of them are too large.
        """
        for info in self._zip.infolist():
            check_inside(info.filename, str(self.path), self.advice)
            if stat.S_ISLNK(info.external_attr >> 16):
                raise DataError(f"{self.path}: member {info.filename!r} is a link; {self.advice}")
        unpacked = sum(info.file_size for info in self._zip.infolist())
        if unpacked > MAX_UNPACKED_BYTES:
            raise DataError(
                f"{self.path} would unpack to {unpacked / 2**30:,.1f} GiB, more than "
                f"{MAX_UNPACKED_BYTES / 2**30:g}; {self.advice}"
            )
        return list(dict.fromkeys(self._zip.namelist()))

    def read(self, name: str) -> bytes:
        """Bytes of a member.

        Raises:
            Refused: it is too large or damaged.
        """
        try:
            with self._zip.open(self.members.get(name, name)) as file:
                return bounded(file.read(MAX_FILE_BYTES + 1))
        except (zipfile.BadZipFile, KeyError, OSError, EOFError, RuntimeError, zlib.error) as error:
            raise Refused(f"cannot be read from the zip: {error}") from error

    @cached_property
    def members(self) -> dict[str, str]:
        """Members by their plain names: `a/b.mid` for a member that was stored as `./a//b.mid`."""
        return {str(PurePosixPath(name)): name for name in reversed(self.names)}


def check_inside(name: str, where: str, advice: str) -> None:
    """Refuse a name that is absolute or climbs out.

    Raises:
        DataError: it is one of those.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or name.startswith(("/", "\\")) or DRIVE.match(name):
        raise DataError(f"{where}: the path {name!r} leads out of the collection; {advice}")


def read_bounded(path: Path) -> bytes:
    """Bytes of a file.

    Raises:
        Refused: it cannot be read, or is larger than 16 MiB.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Refused("is no file, but a folder or a device")
        with path.open("rb") as file:
            return bounded(file.read(MAX_FILE_BYTES + 1))
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror}") from error


def bounded(content: bytes) -> bytes:
    """The content, unless it is larger than any piece of music needs to be.

    Raises:
        Refused: it is.
    """
    if len(content) > MAX_FILE_BYTES:
        raise Refused(f"larger than {MAX_FILE_BYTES // 2**20} MiB")
    return content
