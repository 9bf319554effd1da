"""The token store: all pieces of a source as one memory-mapped file of uint16 ids, with an index beside it.

    <cache>/<key>/tokens.bin   BOS + events + EOS of every piece, one after another
                  marks.bin    only for generated pieces: what is asked for, see `dsmr.data.synthetic`
                  index.json   format, tokenizer, the pieces, the files that were refused and why, checksums

The key is a digest of the pieces' content, their splits and the tokenizer's settings. A store is written beside
its final place and renamed as a whole, under a lock: there is never half a store. Its checksums are compared
whenever it is opened; one in the cache that is damaged, or of an older format, is prepared again.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from dsmr.data.errors import DataError, Refused
from dsmr.data.files import flush, flush_folder
from dsmr.data.midi import read_midi
from dsmr.data.pool import each
from dsmr.data.sources import Entry, Source, Split
from dsmr.data.tokenizer import Encoded, TokenizerSpec, build_tokenizer, encode
from dsmr.data.tokenizer_settings import source_of

FORMAT_VERSION = 2
ENCODING_VERSION = 1  # of what the tokens mean; part of a store's key
CACHE_VARIABLE = "DSMR_CACHE"

Progress = Callable[[int, int], None]
"""Called with (pieces done, pieces in all)."""


@dataclass(frozen=True)
class Piece:
    """One piece in the store.

    Attributes:
        name: path within its source.
        split: train, validation or test.
        start: offset of its BOS in the token file, in tokens.
        length: tokens, BOS and EOS included.
        num_notes: note-ons.
        seconds: end of its last note.
        pitch_min: lowest MIDI pitch.
        pitch_max: highest.
        num_unended: notes of its file that never end and were left out.
    """

    name: str
    split: Split
    start: int
    length: int
    num_notes: int
    seconds: float
    pitch_min: int
    pitch_max: int
    num_unended: int = 0


class TokenStore:
    """A store on disk, opened for reading.

    Args:
        path: its folder.
        is_checked: whether its checksums are compared, which reads all of it (0.1 s for MAESTRO).

    Raises:
        DataError: there is no whole store of this format.
    """

    def __init__(self, path: Path, *, is_checked: bool = True) -> None:
        self.path = path
        try:
            index = json.loads((path / "index.json").read_text(encoding="utf-8"))
            found = index["format_version"]
            if found != FORMAT_VERSION:
                raise DataError(
                    f"{path} has store format {found}, this version reads {FORMAT_VERSION}; delete it and run dsmr "
                    "prepare again"
                )
            if is_checked:
                check_sums(path, index)
            self.description: str = index["source"]
            self.tokenizer_spec = TokenizerSpec(**index["tokenizer"])
            self.pieces = [Piece(**piece) for piece in index["pieces"]]
            self.refused: dict[str, str] = index["refused"]
            self.marks_are_kept: bool = index["marks"]
        except DataError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is no whole token store ({error}); delete it and run dsmr prepare again"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], is_checked=False)  # type: ignore[misc]  # its process has checked it

    @cached_property
    def tokens(self) -> NDArray[np.uint16]:
        """All ids, memory-mapped."""
        return np.memmap(self.path / "tokens.bin", np.uint16, "r")

    @cached_property
    def marks(self) -> NDArray[np.uint16] | None:
        """Per token, the distance in tokens of what it asks for, 0 where nothing is asked; None without marks."""
        return np.memmap(self.path / "marks.bin", np.uint16, "r") if self.marks_are_kept else None

    @property
    def tokens_per_second(self) -> float:
        """Tokens in one second of music, without BOS and EOS: the mean over all pieces."""
        return sum(piece.length - 2 for piece in self.pieces) / sum(piece.seconds for piece in self.pieces)

    def of_split(self, split: Split) -> list[int]:
        """Numbers of the split's pieces, in the source's order."""
        return [number for number, piece in enumerate(self.pieces) if piece.split == split]


def check_sums(path: Path, index: dict[str, Any]) -> None:
    """Compare a store's files with the checksums of its index, and the index with its own.

    Raises:
        DataError: they differ.
        OSError: a file is missing.
    """
    sums = {**index["checksums"], "index.json": index_sum(index)}
    for name, expected in sums.items():
        if name == "index.json":
            found, expected = expected, index["checksum"]
        else:
            with (path / name).open("rb") as file:
                found = hashlib.file_digest(file, new_digest).hexdigest()
        if found != expected:
            raise DataError(
                f"{path / name} is damaged (its checksum is {found}, not {expected}); delete {path} and run dsmr "
                "prepare again"
            )


def index_sum(index: dict[str, Any]) -> str:
    """Checksum of an index, which it carries itself as `checksum`."""
    rest = {key: value for key, value in index.items() if key != "checksum"}
    return new_digest(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def new_digest(content: bytes = b"") -> Any:
    """BLAKE2b of 128 bits."""
    return hashlib.blake2b(content, digest_size=16)


def is_store(folder: Path) -> bool:
    """Whether a folder is a token store rather than one of MIDI files."""
    return all((folder / name).is_file() for name in ("index.json", "tokens.bin"))


def open_store(folder: Path, spec: TokenizerSpec) -> TokenStore:
    """A store that was prepared elsewhere.

    Raises:
        DataError: it is not whole, or its tokens are another tokenizer's.
    """
    store = TokenStore(folder)
    if store.tokenizer_spec != spec:
        raise DataError(
            f"{folder} was tokenised with {asdict(store.tokenizer_spec)}, but data.tokenizer is {asdict(spec)}; give "
            "the MIDI files, or the tokenizer of the store"
        )
    return store


class StoreWriter:
    """Writes a store beside its final place; `finish` renames it."""

    def __init__(self, path: Path, source: str, tokenizer: TokenizerSpec, *, marks: bool) -> None:
        self.path, self.source, self.tokenizer = path, source, tokenizer
        self.pieces: list[Piece] = []
        self.refused: dict[str, str] = {}
        self.num_tokens = 0
        self.folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        self._tokens = (self.folder / "tokens.bin").open("wb")
        self._marks = (self.folder / "marks.bin").open("wb") if marks else None
        self._digests = {name: new_digest() for name in ("tokens.bin", *(["marks.bin"] if marks else []))}

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in filter(None, (self._tokens, self._marks)):
            with suppress(OSError):  # what a full disk did not take is not wanted any more
                file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, entry: Entry, encoded: Encoded, marks: NDArray[np.uint16] | None = None) -> None:
        """Append a piece."""
        self._append("tokens.bin", self._tokens, encoded.ids)
        if self._marks is not None:
            assert marks is not None
            assert marks.shape == encoded.ids.shape
            self._append("marks.bin", self._marks, marks)
        figures = {k: v for k, v in vars(encoded).items() if k != "ids"}
        self.pieces.append(Piece(entry.name, entry.split, self.num_tokens, len(encoded.ids), **figures))
        self.num_tokens += len(encoded.ids)

    def _append(self, name: str, file: IO[bytes], ids: NDArray[np.uint16]) -> None:
        content = ids.astype("<u2").tobytes()
        file.write(content)
        self._digests[name].update(content)

    def finish(self) -> TokenStore:
        """Write the index, flush all to disk and rename."""
        index = {
            "format_version": FORMAT_VERSION,
            "source": self.source,
            "tokenizer": asdict(self.tokenizer),
            "marks": self._marks is not None,
            "refused": self.refused,
            "pieces": [asdict(piece) for piece in self.pieces],
            "checksums": {name: digest.hexdigest() for name, digest in self._digests.items()},
        }
        index["checksum"] = index_sum(index)
        with (self.folder / "index.json").open("w", encoding="utf-8") as file:
            json.dump(index, file, indent=1)
            flush(file)
        for binary in filter(None, (self._tokens, self._marks)):
            flush(binary)
        self.folder.chmod(0o755)
        flush_folder(self.folder)
        self.folder.rename(self.path)
        flush_folder(self.path.parent)
        return TokenStore(self.path, is_checked=False)


def cache_folder(given: str | None = None) -> Path:
    """Where stores lie: the given folder, `$DSMR_CACHE`, or `~/.cache/dsmr`."""
    return Path(given or os.environ.get(CACHE_VARIABLE) or "~/.cache/dsmr").expanduser()


def build_once(path: Path, build: Callable[[], TokenStore]) -> TokenStore:
    """Open the store at `path`, or build it under a lock if there is none, or none that is whole.

    Raises:
        DataError: the cache folder cannot be written.
    """
    whole, fault = opened(path)
    if whole is not None:
        return whole
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            whole, fault = opened(path)
            if whole is not None:
                return whole
            for abandoned in path.parent.glob(f".{path.name}.*"):
                shutil.rmtree(abandoned)
            if fault is not None:
                print(f"{fault.partition(';')[0]}: it is prepared again", file=sys.stderr)
                aside = path.with_name(f".{path.name}.damaged")  # a reader that has it open keeps it
                path.rename(aside)
                shutil.rmtree(aside)
            return build()
    except OSError as error:
        raise DataError(
            f"cannot write the token store in {path.parent} ({error.strerror or error}); "
            f"set {CACHE_VARIABLE} or data.cache_dir to a folder that can be written and has room"
        ) from error


def opened(path: Path) -> tuple[TokenStore | None, str | None]:
    """The store at `path`, or what is wrong with it; neither where there is none."""
    if not path.exists():
        return None, None
    try:
        return TokenStore(path), None
    except DataError as error:
        return None, str(error)


def prepare_midi(
    source: Source,
    spec: TokenizerSpec,
    cache: Path,
    *,
    max_refused_share: float = 0.1,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """Token store of a source, tokenised on all cores unless it is there already.

    Args:
        source: where the pieces come from.
        spec: the tokenizer.
        cache: folder of stores.
        max_refused_share: the share of files that may be unreadable before nothing is stored at all.
        num_workers: processes; None means one for each core.
        progress: called after every piece.

    Raises:
        DataError: no pieces, too many of them refused, or a training or validation split without any.
    """
    build_tokenizer(spec)
    entries = source.entries()
    key = store_key(spec, ((e.name, e.split, _content(source, e.name)) for e in entries))

    def build() -> TokenStore:
        with StoreWriter(cache / key, source.description, spec, marks=False) as writer:
            names = [entry.name for entry in entries]
            done = each(_tokenize, names, _start_worker, (source, spec), num_workers=num_workers)
            for count, (entry, result) in enumerate(zip(entries, done, strict=True), start=1):
                if isinstance(result, str):
                    writer.refused[entry.name] = result
                else:
                    writer.add(entry, result)
                if progress:
                    progress(count, len(entries))
            check_refused(writer.refused, len(entries), max_refused_share)
            return writer.finish()

    return build_once(cache / key, build)


def check_refused(refused: dict[str, str], total: int, max_share: float) -> None:
    """Fail when more than the stated share of the files was refused.

    Raises:
        DataError: with the first reasons.
    """
    if len(refused) > max_share * total or len(refused) == total:
        first = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3])
        raise DataError(
            f"{len(refused)} of {total} files were refused, more than the allowed share of {max_share:g} "
            f"(data.max_refused_share); nothing was stored. {first}"
        )


def store_key(spec: TokenizerSpec, content: Iterable[tuple[str, ...]]) -> str:
    """Name of a store: a digest of content, splits, tokenizer settings and the versions that matter.

    A tokenizer class of the user's own counts with the source of its module.
    """
    digest = hashlib.blake2b(digest_size=12)
    head = (ENCODING_VERSION, version("miditok"), version("symusic"), asdict(spec))
    digest.update(json.dumps(head, sort_keys=True).encode())
    digest.update(source_of(spec.name).encode())
    for row in content:
        digest.update(json.dumps(row).encode())
    return f"{spec.name}-{digest.hexdigest()}"


def _content(source: Source, name: str) -> str:
    try:
        return hashlib.blake2b(source.read(name), digest_size=16).hexdigest()
    except Refused as refused:
        return f"refused: {refused}"


_worker: tuple[Source, Any]


def _start_worker(source: Source, spec: TokenizerSpec) -> None:
    global _worker
    _worker = (source, build_tokenizer(spec))


def _tokenize(name: str) -> Encoded | str:
    source, tokenizer = _worker
    try:
        score, num_unended = read_midi(source.read(name))
        return replace(encode(tokenizer, score), num_unended=num_unended)
    except Refused as refused:
        return str(refused)
    except Exception as error:  # one file never stops the others, whatever a tokenizer makes of it
        return f"cannot be tokenised: {error!r}"
