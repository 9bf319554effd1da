"""Any collection of MIDI files, a folder searched to the bottom or a zip; the split depends on the pieces alone.

Pieces are ordered by a digest of their content: the first tenth is validation, the next tenth test, the rest
training; a single piece is for training. Files of the same content always share a split, whatever they are called. A
file that is no piano music takes no place in it; it is refused by name later.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from symusic import Score

from dsmr.data.errors import DataError, Refused
from dsmr.data.pool import each
from dsmr.data.sources import Entry, Split
from dsmr.data.tokenizer import piano_part
from dsmr.data.zips import ZipReader, read_bounded

SUFFIXES = (".mid", ".midi", ".kar")
HELD_OUT_SHARE = 0.1


class MidiFiles(ABC):
    """MIDI files at a path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def description(self) -> str:
        """What a person reads in messages."""
        return f"MIDI files in {self.path}"

    @abstractmethod
    def names(self) -> list[str]:
        """MIDI files in a fixed order, with `/` between the parts of a name."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Bytes of one file; raises `Refused` where it cannot be read."""

    def entries(self) -> list[Entry]:
        """Files in the order of their names.

        Raises:
            DataError: there is none.
        """
        names = self.names()
        if not names:
            raise DataError(
                f"no MIDI file ({', '.join(SUFFIXES)}) in {self.path}; give a folder or a zip that has some"
            )
        examined = each(_digest, names, _start_worker, (self,))
        digests = dict(zip(names, examined, strict=True))
        splits = split_by_digest(sorted({found.hex for found in digests.values() if isinstance(found, Digest)}))
        return [
            Entry(name, splits[found.hex] if isinstance(found, Digest) else "train") for name, found in digests.items()
        ]


class MidiFolder(MidiFiles):
    """MIDI files below a folder."""

    def names(self) -> list[str]:
        """See `MidiFiles.names`."""
        found = (path.relative_to(self.path) for path in self.path.rglob("*"))
        return midi_names(path.as_posix() for path in found)

    def read(self, name: str) -> bytes:
        """See `MidiFiles.read`."""
        return read_bounded(self.path / name)


class MidiZip(MidiFiles):
    """MIDI files in a zip, read in place; the names, and so the token store, are those of the unpacked folder."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.zip = ZipReader(path, "unpack it and give the folder, or make it again without that")

    def names(self) -> list[str]:
        """See `MidiFiles.names`."""
        return midi_names(name for name in self.zip.names if not name.endswith("/"))

    def read(self, name: str) -> bytes:
        """See `MidiFiles.read`."""
        return self.zip.read(name)


def midi_names(names: Iterable[str]) -> list[str]:
    """Names of MIDI files in order; without what macOS keeps beside files (`._NAME`, `__MACOSX`)."""
    paths = (PurePosixPath(name) for name in names)
    wanted = (path for path in paths if path.suffix.lower() in SUFFIXES and not path.name.startswith("._"))
    return [str(path) for path in sorted(wanted)]


@dataclass(frozen=True)
class Digest:
    """Of a file's content, in hexadecimal digits."""

    hex: str


_worker: MidiFiles


def _start_worker(files: MidiFiles) -> None:
    global _worker
    _worker = files


def _digest(name: str) -> Digest | str:
    """Digest of a file's content, or why it is no piano music that can be read."""
    try:
        content = _worker.read(name)
        piano_part(Score.from_midi(content))
    except (Refused, RuntimeError, ValueError) as error:
        return str(error)
    return Digest(hashlib.blake2b(content).hexdigest())


def split_by_digest(digests: list[str]) -> dict[str, Split]:
    """Split of every piece, given their sorted digests: one tenth each is held out, at least one of two or more."""
    held_out = max(1, round(len(digests) * HELD_OUT_SHARE)) if len(digests) > 1 else 0
    num_test = held_out if len(digests) > 2 * held_out else 0
    sizes: dict[Split, int] = {"validation": held_out, "test": num_test}
    sizes["train"] = len(digests) - held_out - num_test
    splits = [split for split, size in sizes.items() for _ in range(size)]
    return dict(zip(digests, splits, strict=True))
