"""MAESTRO from its official address: gone on with after every break, and taken only with its published checksum."""

import hashlib
import http.client
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from dsmr.data.errors import DataError
from dsmr.data.files import flush, flush_folder

NAME = "maestro-v3.0.0-midi.zip"
ADDRESS = f"https://storage.googleapis.com/magentadata/datasets/maestro/v3.0.0/{NAME}"
SHA256 = "70470ee253295c8d2c71e6d9d4a815189e35c89624b76d22fce5a019d5dde12c"
LICENCE = "MAESTRO v3.0.0, Hawthorne et al., ICLR 2019, CC BY-NC-SA 4.0"
BLOCK = 1 << 18
TIMEOUT_SECONDS = 30.0
ATTEMPTS = 5  # in a row that bring nothing
BROKEN = (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, TimeoutError, ConnectionError)

Progress = Callable[[int, int], None]
"""Called with (bytes there, bytes in all)."""


def download_maestro(
    folder: Path,
    *,
    address: str = ADDRESS,
    sha256: str = SHA256,
    progress: Progress | None = None,
    pause: float = 1.0,
) -> Path:
    """The official MIDI zip in a folder, downloaded if it is not there yet.

    Args:
        folder: made where it is missing.
        address: of the zip.
        sha256: its published checksum.
        progress: called after every block.
        pause: seconds before a second attempt, doubled before each further one.

    Returns:
        path of the zip.

    Raises:
        DataError: the address does not answer, what came is another file, or the folder cannot be written.
    """
    target = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{NAME}.lock"):
            if target.is_file() and checksum(target) == sha256:
                return target
            part = folder / f".{NAME}.part"
            fetch(address, part, progress, pause)
            found = checksum(part)
            if found != sha256:
                part.unlink()
                raise DataError(f"what {address} gave has the checksum {found}, not the published {sha256}; try again")
            part.replace(target)
            flush_folder(folder)
            return target
    except OSError as error:
        raise DataError(
            f"cannot write {folder} ({error.strerror or error}); set DSMR_CACHE or data.cache_dir to a folder that "
            "can be written and has room; what was downloaded is kept"
        ) from error


def fetch(address: str, part: Path, progress: Progress | None, pause: float) -> None:
    """Bring a file to its end, from where it was left.

    Raises:
        DataError: several attempts in a row brought nothing.
    """
    failed = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if fetch_rest(address, part, before, progress):
                return
            reason: object = "the connection broke off"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing after what is there: whole, or not a beginning of this file
                return
            reason = f"{error.code} {error.reason}"
        except (*BROKEN, ValueError) as error:
            reason = getattr(error, "reason", error)
        grown = part.exists() and part.stat().st_size > before
        failed = 0 if grown else failed + 1
        if failed == ATTEMPTS:
            raise DataError(
                f"{address} cannot be read ({reason}); try again later: it goes on where it was left, or download "
                "the zip by hand and set DSMR_MAESTRO to it"
            )
        wait = pause * 2**failed if failed else 0.0
        print(f"{reason}: trying again in {wait:g} s", file=sys.stderr, flush=True)
        time.sleep(wait)


def fetch_rest(address: str, part: Path, before: int, progress: Progress | None) -> bool:
    """Append what follows the bytes that are there; gives whether the end was reached."""
    request = urllib.request.Request(address, headers={"Range": f"bytes={before}-"} if before else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {before}-")
        there = before if goes_on else 0
        total = there + int(answer.headers.get("Content-Length") or 0)
        with part.open("ab" if goes_on else "wb") as file:
            try:
                while block := answer.read(BLOCK):
                    file.write(block)
                    there += len(block)
                    if progress:
                        progress(there, max(total, there))
            finally:
                flush(file)
    return there >= total


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
