"""MAESTRO (Hawthorne et al., ICLR 2019, CC BY-NC-SA 4.0), from the official MIDI zip or its unpacked folder.

The split is the official one, from the CSV. Nothing is unpacked: members are read where they are, and a name
that leads out of the collection is refused before anything is read.
"""

import csv
import io
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path, PurePosixPath

from dsmr.data.errors import DataError, Refused
from dsmr.data.sources import SPLITS, Entry
from dsmr.data.zips import ZipReader, check_inside, read_bounded

ENVIRONMENT_VARIABLE = "DSMR_MAESTRO"
CSV_PATTERN = "maestro-v*.csv"
OFFICIAL = "take the official zip"
ADVICE = f"dsmr prepare --download fetches it, or set {ENVIRONMENT_VARIABLE} to maestro-v3.0.0-midi.zip"


class MaestroZip:
    """The official MIDI zip, read in place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.zip = ZipReader(path, OFFICIAL)

    @property
    def description(self) -> str:
        """What a person reads in messages."""
        return f"MAESTRO in {self.path}"

    @cached_property
    def _csv_name(self) -> str:
        names = csv_names(self.zip.names)
        if len(names) != 1:
            raise DataError(f"{self.path} holds {len(names)} files named {CSV_PATTERN}, not one; {ADVICE}")
        return names[0]

    def entries(self) -> list[Entry]:
        """Pieces in the order of the CSV."""
        where = f"{self.path}:{self._csv_name}"
        try:
            text = self.zip.read(self._csv_name)
        except Refused as refused:
            raise DataError(f"{where} {refused}; {ADVICE}") from refused
        entries = read_csv(text, where)
        present = set(self.zip.names)
        missing = [e.name for e in entries if self._member(e.name) not in present]
        return complete(entries, missing, self._csv_name)

    def read(self, name: str) -> bytes:
        """Bytes of one piece; a member that is too large or damaged is refused."""
        return self.zip.read(self._member(name))

    def _member(self, name: str) -> str:
        return str(PurePosixPath(self._csv_name).parent / name)


class MaestroFolder:
    """The unpacked collection."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def description(self) -> str:
        """What a person reads in messages."""
        return f"MAESTRO in {self.path}"

    def entries(self) -> list[Entry]:
        """Pieces in the order of the CSV."""
        (csv_path,) = find_csv(self.path)
        try:
            entries = read_csv(read_bounded(csv_path), str(csv_path))
        except Refused as refused:
            raise DataError(f"{csv_path} {refused}; {ADVICE}") from refused
        root = self.path.resolve()
        for entry in entries:
            if not (self.path / entry.name).resolve().is_relative_to(root):
                raise DataError(f"{csv_path}: {entry.name!r} leads out of {self.path}; take the official files")
        missing = [e.name for e in entries if not (self.path / e.name).is_file()]
        return complete(entries, missing, csv_path.name)

    def read(self, name: str) -> bytes:
        """Bytes of one piece."""
        return read_bounded(self.path / name)


def find_maestro(path: str | os.PathLike[str]) -> MaestroZip | MaestroFolder:
    """MAESTRO at a path: the zip, the folder that holds the CSV, or the folder above that one.

    Raises:
        DataError: there is no such path, or no MAESTRO in it.
    """
    given = Path(path).expanduser()
    if not given.exists():
        raise DataError(f"{given} does not exist; {ADVICE}")
    if given.is_file():
        return MaestroZip(given)
    for folder in (given, only_child(given)):
        found = find_csv(folder)
        if len(found) > 1:
            raise DataError(f"{folder} holds {len(found)} files named {CSV_PATTERN}, not one; {ADVICE}")
        if found:
            return MaestroFolder(folder)
    raise DataError(f"{given} holds no {CSV_PATTERN}; {ADVICE}")


def only_child(folder: Path) -> Path:
    """The one thing that a folder holds, as after unpacking a zip; the folder itself if it holds more."""
    children = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return children[0] if len(children) == 1 and children[0].is_dir() else folder


def find_csv(folder: Path) -> list[Path]:
    """The CSV files of a MAESTRO folder."""
    return sorted(folder.glob(CSV_PATTERN))


def csv_names(names: Iterable[str]) -> list[str]:
    """The CSV files of MAESTRO among the members of a zip."""
    return [name for name in names if PurePosixPath(name).match(CSV_PATTERN)]


def read_csv(content: bytes, where: str) -> list[Entry]:
    """Entries of the official CSV.

    Raises:
        DataError: it is no text, a column is missing, a split has another name, or a path leads out; with the line.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text ({error.reason}); take the official CSV") from error
    if "\0" in text:
        raise DataError(f"{where} holds NUL bytes; take the official CSV")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    lacking = {"split", "midi_filename"} - set(reader.fieldnames or ())
    if lacking:
        raise DataError(f"{where}: no column {' and '.join(sorted(lacking))}; take the official CSV")
    entries = []
    for row in reader:
        name, split = row["midi_filename"], row["split"]
        check_inside(name or "", f"{where}, line {reader.line_num}", "take the official files")
        if split not in SPLITS:
            raise DataError(f"{where}, line {reader.line_num}: split {split!r} is not one of {', '.join(SPLITS)}")
        entries.append(Entry(name, split))
    return entries


def complete(entries: list[Entry], missing: list[str], csv_name: str) -> list[Entry]:
    """The entries, if there are any and all of their files are there.

    Raises:
        DataError: otherwise.
    """
    if not entries:
        raise DataError(f"{csv_name} lists no pieces; {ADVICE}")
    if missing:
        raise DataError(
            f"{len(missing)} of {len(entries)} files of {csv_name} are missing, first {missing[0]}; {ADVICE}"
        )
    return entries
