"""Write a token store: beside its final path, renamed as a whole when complete, under a lock."""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from dsmr import UserError
from dsmr.data.files import sync_file, sync_folder
from dsmr.data.sources import Entry
from dsmr.data.store import CACHE_VARIABLE, FORMAT_VERSION, Piece, TokenStore, index_checksum, new_digest
from dsmr.data.tokenizer import Encoded, TokenizerSpec


class StoreWriter:
    """A store in the making, in a hidden folder beside `path`; `finish` moves it there.

    With `marks`, every piece comes with marks, see `dsmr.data.synthetic`.
    """

    def __init__(self, path: Path, source: str, tokenizer: TokenizerSpec, *, marks: bool) -> None:
        self.path, self.source, self.tokenizer = path, source, tokenizer
        self.pieces: list[Piece] = []
        self.refused: dict[str, str] = {}
        self.num_tokens = 0
        self.folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        names = ("tokens.bin", "marks.bin") if marks else ("tokens.bin",)
        self._files = {name: (self.folder / name).open("wb") for name in names}
        self._digests = {name: new_digest() for name in names}

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with suppress(OSError):  # closing flushes, which fails once more on a full disk
                file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, entry: Entry, encoded: Encoded, marks: NDArray[np.uint16] | None = None) -> None:
        """Append a piece."""
        columns = [encoded.ids] if marks is None else [encoded.ids, marks]
        for (name, file), ids in zip(self._files.items(), columns, strict=True):
            assert ids.shape == encoded.ids.shape
            content = ids.astype("<u2").tobytes()
            file.write(content)
            self._digests[name].update(content)
        statistics = {key: value for key, value in vars(encoded).items() if key != "ids"}
        self.pieces.append(Piece(entry.name, entry.split, self.num_tokens, len(encoded.ids), **statistics))
        self.num_tokens += len(encoded.ids)

    def finish(self) -> TokenStore:
        """Write the index, flush everything to disk, and move the store to its path."""
        index = {
            "format_version": FORMAT_VERSION,
            "source": self.source,
            "tokenizer": asdict(self.tokenizer),
            "marks": "marks.bin" in self._files,
            "refused": self.refused,
            "pieces": [asdict(piece) for piece in self.pieces],
            "checksums": {name: digest.hexdigest() for name, digest in self._digests.items()},
        }
        index["checksum"] = index_checksum(index)
        with (self.folder / "index.json").open("w", encoding="utf-8") as file:
            json.dump(index, file, indent=1)
            sync_file(file)
        for binary in self._files.values():
            sync_file(binary)
        self.folder.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        # Content before name: after a power cut, a store that has its final name is complete.
        sync_folder(self.folder)
        self.folder.rename(self.path)
        sync_folder(self.path.parent)
        return TokenStore(self.path, is_checked=False)


def open_or_build(path: Path, build: Callable[[], TokenStore]) -> TokenStore:
    """Open the store at `path`; build it under a lock if it is missing or damaged.

    Raises `UserError` if the cache folder is not writable, or full.
    """
    store, fault = try_open(path)
    if store is not None:
        return store
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):
            store, fault = try_open(path)  # another process may have built it while this one waited
            if store is not None:
                return store
            for abandoned in path.parent.glob(f".{path.name}.*"):  # by a process that was killed
                shutil.rmtree(abandoned)
            if fault is not None:
                print(f"{fault.partition(';')[0]}: preparing it again", file=sys.stderr)
                aside = path.with_name(f".{path.name}.damaged")  # renamed first: a reader may have it open
                path.rename(aside)
                shutil.rmtree(aside)
            return build()
    except OSError as error:
        raise UserError(
            f"cannot write the token store in {path.parent} ({error.strerror or error}); "
            f"set {CACHE_VARIABLE} or data.cache_dir to a writable folder with enough free space"
        ) from error


def try_open(path: Path) -> tuple[TokenStore | None, str | None]:
    """Return the store at `path`, or the reason why it cannot be opened; (None, None) if there is none."""
    if not path.exists():
        return None, None
    try:
        return TokenStore(path), None
    except UserError as error:
        return None, str(error)
