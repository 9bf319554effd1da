"""Sources at a path: MAESTRO, or any folder or zip of MIDI files, whose split depends only on the files' content.

Pieces are ordered by a digest of their content: the first tenth is validation, the next tenth test, the rest training;
a single piece is for training. Copies of a file therefore share its split, whatever their names. Files without piano
music do not count here; they are refused by name during preparation.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from zipfile import is_zipfile

from symusic import Score

from dsmr import UserError
from dsmr.data.maestro import find_maestro, find_maestro_csv, maestro_csv_names, only_child
from dsmr.data.readers import open_reader
from dsmr.data.sources import Entry, Refused, Source, Split
from dsmr.data.tokenizer import piano_part
from dsmr.data.workers import map_in_workers

MIDI_SUFFIXES = (".mid", ".midi", ".kar")
HELD_OUT_SHARE = 0.1
GIVE_DATA = "give a folder or a zip of MIDI files, MAESTRO's zip or folder, or a token store"


def find_source(path: Path, option: str) -> Source:
    """Open the MIDI files at a path: MAESTRO if its CSV is there, otherwise a folder or a zip of MIDI files.

    Args:
        path: an existing path.
        option: name of the setting that gave it, for messages.

    Raises:
        UserError: the path is a file but not a readable zip.
    """
    if path.is_dir():
        is_maestro = bool(find_maestro_csv(path) or find_maestro_csv(only_child(path)))
        return find_maestro(path) if is_maestro else MidiFiles(path)
    if path.suffix.lower() in MIDI_SUFFIXES:
        raise UserError(f"{option}: {path} is a single MIDI file; {GIVE_DATA}")
    if not is_zipfile(path):
        is_damaged = path.suffix.lower() == ".zip"
        what = "is not a readable zip: damaged or incomplete" if is_damaged else "is neither a folder nor a zip"
        raise UserError(f"{option}: {path} {what}; {GIVE_DATA}")
    files = MidiFiles(path)
    return find_maestro(path) if maestro_csv_names(files.reader.names) else files


class MidiFiles:
    """MIDI files in a folder and all folders below it, or in a zip.

    Names, and thus the token store, are the same for a zip and its unpacked folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reader = open_reader(path, "unpack it and give the folder, or make it again without that")

    @property
    def description(self) -> str:
        """Name of the source in messages."""
        return f"MIDI files in {self.path}"

    def names(self) -> list[str]:
        """List the MIDI files in a fixed order, with `/` between the parts of a name."""
        return midi_names(name for name in self.reader.names if not name.endswith("/"))

    def read(self, name: str) -> bytes:
        """Return the content of one file; raises `Refused` if it cannot be read."""
        return self.reader.read(name)

    def entries(self) -> list[Entry]:
        """List the files in the order of their names; raises `UserError` if there are none."""
        names = self.names()
        if not names:
            raise UserError(
                f"no MIDI file ({', '.join(MIDI_SUFFIXES)}) in {self.path}; give a folder or a zip that has some"
            )
        examined = map_in_workers(_digest, names, _start_worker, (self,))
        digests = dict(zip(names, examined, strict=True))
        splits = split_by_digest(sorted({found.hex for found in digests.values() if isinstance(found, Digest)}))
        return [
            Entry(name, splits[found.hex] if isinstance(found, Digest) else "train") for name, found in digests.items()
        ]


def midi_names(names: Iterable[str]) -> list[str]:
    """Sort the names of MIDI files; leaves out what macOS keeps beside files (`._NAME`, `__MACOSX`)."""
    paths = (PurePosixPath(name) for name in names)
    wanted = (path for path in paths if path.suffix.lower() in MIDI_SUFFIXES and not path.name.startswith("._"))
    return [str(path) for path in sorted(wanted)]


@dataclass(frozen=True)
class Digest:
    """Digest of a file's content, in hexadecimal; a type of its own, because workers return errors as strings."""

    hex: str


_worker: MidiFiles


def _start_worker(files: MidiFiles) -> None:
    global _worker
    _worker = files


def _digest(name: str) -> Digest | str:
    """Return the digest of a file's content, or the reason why it has no readable piano music."""
    try:
        content = _worker.read(name)
        piano_part(Score.from_midi(content))
    except (Refused, RuntimeError, ValueError) as error:
        return str(error)
    return Digest(hashlib.blake2b(content).hexdigest())


def split_by_digest(digests: list[str]) -> dict[str, Split]:
    """Assign splits to sorted digests: a tenth each for validation and test, at least one of each if possible."""
    held_out = max(1, round(len(digests) * HELD_OUT_SHARE)) if len(digests) > 1 else 0
    num_test = held_out if len(digests) > 2 * held_out else 0
    sizes: dict[Split, int] = {"validation": held_out, "test": num_test}
    sizes["train"] = len(digests) - held_out - num_test
    splits = [split for split, size in sizes.items() for _ in range(size)]
    return dict(zip(digests, splits, strict=True))
