"""MAESTRO v3.0.0 (Hawthorne et al., ICLR 2019, CC BY-NC-SA 4.0): its download, and its zip or folder as a source.

The split is the official one, from the CSV. A path that leads out of the collection is refused.
"""

import csv
import io
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from dsmr import UserError
from dsmr.data.sources import SPLITS, Entry, Refused, check_inside, open_reader

MAESTRO_NAME = "maestro-v3.0.0-midi.zip"
MAESTRO_URL = f"https://storage.googleapis.com/magentadata/datasets/maestro/v3.0.0/{MAESTRO_NAME}"
MAESTRO_SHA256 = "70470ee253295c8d2c71e6d9d4a815189e35c89624b76d22fce5a019d5dde12c"
MAESTRO_LICENCE = "MAESTRO v3.0.0, Hawthorne et al., ICLR 2019, CC BY-NC-SA 4.0"
MAESTRO_VARIABLE = "DSMR_MAESTRO"
DOWNLOAD_RETRIES = 4
DOWNLOAD_TIMEOUT_SECONDS = 30.0
CSV_PATTERN = "maestro-v*.csv"
GET_MAESTRO = f"dsmr prepare --download fetches it, or set {MAESTRO_VARIABLE} to {MAESTRO_NAME}"


def download_maestro(folder: Path, *, url: str = MAESTRO_URL, sha256: str = MAESTRO_SHA256) -> Path:
    """Download the official MIDI zip (58 MB), unless the folder has it already.

    A file with the right checksum is returned without any network access. Raises `UserError` if the server cannot be
    reached or sent another file, or the folder is not writable.
    """
    import pooch  # imports requests, which no other command needs
    from requests import RequestException
    from tqdm.auto import tqdm

    def download(url: str, file: Any, fetcher: Any) -> None:
        # pooch sets the total from the answer, but tests `if bar` before, which tqdm refuses without a total
        with tqdm(desc="downloading", total=1, unit="B", unit_scale=True, delay=0.5) as bar:
            fetch = pooch.HTTPDownloader(progressbar=bar, chunk_size=2**18, timeout=DOWNLOAD_TIMEOUT_SECONDS)
            fetch(url, file, fetcher)

    registry, urls = {MAESTRO_NAME: f"sha256:{sha256}"}, {MAESTRO_NAME: url}
    fetcher = pooch.create(folder, "", registry=registry, urls=urls, retry_if_failed=DOWNLOAD_RETRIES)
    advice = f"try again later, or download the zip by hand and set {MAESTRO_VARIABLE} to it"
    try:
        return Path(fetcher.fetch(MAESTRO_NAME, downloader=download))
    except RequestException as error:  # an OSError as well, so it comes first
        reason = getattr(next(iter(error.args), None), "reason", error)  # that of urllib3, without a list of retries
        raise UserError(f"cannot download {url} ({reason}); {advice}") from error
    except ValueError as error:  # pooch's, for a wrong checksum
        raise UserError(f"{url} sent a file with a wrong checksum, not {sha256}; {advice}") from error
    except OSError as error:
        raise UserError(
            f"cannot write {folder} ({error.strerror or error}); set DSMR_CACHE or data.cache_dir to a writable "
            "folder with 60 MB of free space"
        ) from error


class Maestro:
    """The official collection, as a folder with the CSV or as a zip."""

    def __init__(self, path: Path) -> None:
        self.path, self.description = path, f"MAESTRO in {path}"
        self.reader = open_reader(path, "take the official files")

    @cached_property
    def _csv_name(self) -> str:
        is_folder = self.path.is_dir()
        names = [p.name for p in self.path.glob(CSV_PATTERN)] if is_folder else maestro_csv_names(self.reader.names)
        if len(names) != 1:
            raise UserError(f"{self.path} has {len(names)} files named {CSV_PATTERN}, not one; {GET_MAESTRO}")
        return names[0]

    def entries(self) -> list[Entry]:
        """List all pieces in the order of the CSV."""
        where = f"{self.path}:{self._csv_name}"
        try:
            content = self.reader.read(self._csv_name)
        except Refused as refused:
            raise UserError(f"{where} {refused}; {GET_MAESTRO}") from refused
        entries = parse_maestro_csv(content, where)
        if not entries:
            raise UserError(f"{where} lists no pieces; {GET_MAESTRO}")
        missing = [entry.name for entry in entries if not self.reader.has(self._member(entry.name))]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(entries)} files of {where} are missing, first {missing[0]}; {GET_MAESTRO}"
            )
        return entries

    def read(self, name: str) -> bytes:
        """Return the content of one piece; raises `Refused` if it is too large or damaged."""
        return self.reader.read(self._member(name))

    def _member(self, name: str) -> str:
        return str(PurePosixPath(self._csv_name).parent / name)


def find_maestro_folder(path: Path) -> Path | None:
    """Return the folder with MAESTRO's CSV: this one, or its only child, as after unpacking a zip."""
    children = [child for child in path.iterdir() if not child.name.startswith(".")]
    folders = [path, *children] if len(children) == 1 else [path]
    return next((folder for folder in folders if any(folder.glob(CSV_PATTERN))), None)


def maestro_csv_names(names: Iterable[str]) -> list[str]:
    """List MAESTRO's CSV files among the members of a zip."""
    return [name for name in names if PurePosixPath(name).match(CSV_PATTERN)]


def parse_maestro_csv(content: bytes, where: str) -> list[Entry]:
    """Parse the official CSV; raises `UserError` with the line if it is damaged or a path leads out."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text ({error.reason}); take the official CSV") from error
    if "\0" in text:
        raise UserError(f"{where} contains NUL bytes; take the official CSV")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = {"split", "midi_filename"} - set(reader.fieldnames or ())
    if missing:
        raise UserError(f"{where}: no column {' and '.join(sorted(missing))}; take the official CSV")
    entries = []
    for row in reader:
        name, split = row["midi_filename"], row["split"]
        check_inside(name or "", f"{where}, line {reader.line_num}", "take the official files")
        if split not in SPLITS:
            raise UserError(f"{where}, line {reader.line_num}: split {split!r} is not one of {', '.join(SPLITS)}")
        entries.append(Entry(name, split))
    return entries
