"""Sources at a path: MAESTRO, or any folder or zip of MIDI files, whose split depends only on the files' content.

Pieces are ordered by a digest of their content: the first tenth is validation, the next tenth test, the rest training;
a single piece is for training. Copies of a file therefore share its split, whatever their names. Files without piano
music do not count here; they are refused by name during preparation.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import is_zipfile

from symusic import Score

from dsmr import UserError
from dsmr.data.maestro import Maestro, find_maestro_folder, maestro_csv_names
from dsmr.data.sources import Entry, Refused, Split, open_reader
from dsmr.data.tokenizer import piano_part
from dsmr.data.workers import map_in_workers

MIDI_SUFFIXES = (".mid", ".midi", ".kar")
HELD_OUT_SHARE = 0.1
GIVE_DATA = "give a folder or a zip of MIDI files, MAESTRO's zip or folder, or a token store"


class MidiFiles:
    """MIDI files in a folder and all folders below it, or in a zip; a zip has the names of its unpacked folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.description = path, f"MIDI files in {path}"
        self.reader = open_reader(path, "unpack it and give the folder, or make it again without that")

    def names(self) -> list[str]:
        """Sort the names of MIDI files; leaves out what macOS keeps beside files (`._NAME`, `__MACOSX`)."""
        paths = (PurePosixPath(name) for name in self.reader.names if not name.endswith("/"))
        wanted = (path for path in paths if path.suffix.lower() in MIDI_SUFFIXES and not path.name.startswith("._"))
        return [str(path) for path in sorted(wanted)]

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
        digests = list(map_in_workers(self._digest, names))
        splits = split_by_digest(sorted({digest for digest in digests if isinstance(digest, bytes)}))
        return [Entry(name, splits.get(digest, "train")) for name, digest in zip(names, digests, strict=True)]

    def _digest(self, name: str) -> bytes | str:
        """Return the digest of a file's content, or the reason why it has no readable piano music."""
        try:
            content = self.read(name)
            piano_part(Score.from_midi(content))
        except (Refused, RuntimeError, ValueError) as error:
            return str(error)
        return hashlib.blake2b(content).digest()


Source = Maestro | MidiFiles
"""A collection of MIDI files; picklable, because worker processes read from it."""


def find_source(path: Path, option: str) -> Source:
    """Open the MIDI files at an existing path: MAESTRO if its CSV is there, otherwise a folder or a zip of MIDI files.

    Raises `UserError`, which names the `option` that gave the path, if it is a file but not a readable zip.
    """
    if path.is_dir():
        folder = find_maestro_folder(path)
        return Maestro(folder) if folder else MidiFiles(path)
    if path.suffix.lower() in MIDI_SUFFIXES:
        raise UserError(f"{option}: {path} is a single MIDI file; {GIVE_DATA}")
    if not is_zipfile(path):
        is_damaged = path.suffix.lower() == ".zip"
        what = "is not a readable zip: damaged or incomplete" if is_damaged else "is neither a folder nor a zip"
        raise UserError(f"{option}: {path} {what}; {GIVE_DATA}")
    files = MidiFiles(path)
    return Maestro(path) if maestro_csv_names(files.reader.names) else files


def split_by_digest(digests: Sequence[Any]) -> dict[Any, Split]:
    """Assign splits to sorted digests: a tenth each for validation and test, at least one of each if possible."""
    held_out = max(1, round(len(digests) * HELD_OUT_SHARE)) if len(digests) > 1 else 0
    num_test = held_out if len(digests) > 2 * held_out else 0
    splits: dict[Any, Split] = dict.fromkeys(digests, "train")
    splits.update(dict.fromkeys(digests[:held_out], "validation"))
    splits.update(dict.fromkeys(digests[held_out : held_out + num_test], "test"))
    return splits
