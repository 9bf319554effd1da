"""The token store: all pieces of a source as one memory-mapped file of uint16 ids, with an index beside it.

    <cache>/<key>/tokens.bin   BOS + events + EOS of every piece, one after another
                  marks.bin    only for generated pieces: what is asked for, see `dsmr.data.synthetic`
                  index.json   format, tokenizer, the pieces, the files that were refused and why

The key is a digest of the pieces' content, their splits and the tokenizer's settings. A store is written beside
its final place and renamed as a whole, under a lock: there is never half a store.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from dsmr.data.errors import DataError, Refused
from dsmr.data.sources import Entry, Source, Split
from dsmr.data.tokenizer import Encoded, TokenizerSpec, build_tokenizer, encode

FORMAT_VERSION = 1
MAX_SECONDS = 4 * 3600
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
    """

    name: str
    split: Split
    start: int
    length: int
    num_notes: int
    seconds: float
    pitch_min: int
    pitch_max: int


class TokenStore:
    """A store on disk, opened for reading.

    Raises:
        DataError: there is no whole store of this format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            index = json.loads((path / "index.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is no token store ({error}); delete it and run dsmr prepare again") from error
        if index.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{path} has store format {index.get('format_version')}, this version reads {FORMAT_VERSION}; "
                "delete it and run dsmr prepare again"
            )
        self.description: str = index["source"]
        self.tokenizer_spec = TokenizerSpec(**index["tokenizer"])
        self.pieces = [Piece(**piece) for piece in index["pieces"]]
        self.refused: dict[str, str] = index["refused"]
        self.marks_are_kept: bool = index["marks"]
        expected = 2 * sum(piece.length for piece in self.pieces)
        for name in ("tokens.bin", *(["marks.bin"] if self.marks_are_kept else [])):
            size = (path / name).stat().st_size if (path / name).exists() else 0
            if size != expected:
                raise DataError(f"{path / name} has {size} bytes, not {expected}; delete {path} and prepare again")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    @cached_property
    def tokens(self) -> NDArray[np.uint16]:
        """All ids, memory-mapped."""
        return np.memmap(self.path / "tokens.bin", np.uint16, "r")

    @cached_property
    def marks(self) -> NDArray[np.uint16] | None:
        """Per token, the distance in tokens of what it asks for, 0 where nothing is asked; None without marks."""
        return np.memmap(self.path / "marks.bin", np.uint16, "r") if self.marks_are_kept else None

    def of_split(self, split: Split) -> list[int]:
        """Numbers of the split's pieces, in the source's order."""
        return [number for number, piece in enumerate(self.pieces) if piece.split == split]


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

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in filter(None, (self._tokens, self._marks)):
            file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, entry: Entry, encoded: Encoded, marks: NDArray[np.uint16] | None = None) -> None:
        """Append a piece."""
        self._tokens.write(encoded.ids.tobytes())
        if self._marks is not None:
            assert marks is not None
            assert marks.shape == encoded.ids.shape
            self._marks.write(marks.astype(np.uint16).tobytes())
        figures = {k: v for k, v in vars(encoded).items() if k != "ids"}
        self.pieces.append(Piece(entry.name, entry.split, self.num_tokens, len(encoded.ids), **figures))
        self.num_tokens += len(encoded.ids)

    def finish(self) -> TokenStore:
        """Write the index, flush all to disk and rename."""
        index = {
            "format_version": FORMAT_VERSION,
            "source": self.source,
            "tokenizer": asdict(self.tokenizer),
            "marks": self._marks is not None,
            "refused": self.refused,
            "pieces": [asdict(piece) for piece in self.pieces],
        }
        with (self.folder / "index.json").open("w", encoding="utf-8") as file:
            json.dump(index, file, indent=1)
            flush(file)
        for binary in filter(None, (self._tokens, self._marks)):
            flush(binary)
        self.folder.chmod(0o755)
        self.folder.rename(self.path)
        return TokenStore(self.path)


def flush(file: Any) -> None:
    """Make sure that what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def cache_folder(given: str | None = None) -> Path:
    """Where stores lie: the given folder, `$DSMR_CACHE`, or `~/.cache/dsmr`."""
    return Path(given or os.environ.get(CACHE_VARIABLE) or "~/.cache/dsmr").expanduser()


def build_once(path: Path, build: Callable[[], TokenStore]) -> TokenStore:
    """Open the store at `path`, or build it under a lock if there is none.

    Raises:
        DataError: the cache folder cannot be written, or the store there is damaged.
    """
    if path.exists():
        return TokenStore(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if path.exists():
                return TokenStore(path)
            for abandoned in path.parent.glob(f".{path.name}.*"):
                shutil.rmtree(abandoned)
            return build()
    except OSError as error:
        raise DataError(
            f"cannot write the token store in {path.parent} ({error.strerror or error}); "
            f"set {CACHE_VARIABLE} or data.cache_dir to a folder that can be written and has room"
        ) from error


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
            done = tokenized(source, spec, entries, num_workers or usable_cores())
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
    """Name of a store: a digest of content, splits, tokenizer settings and the versions that matter."""
    digest = hashlib.blake2b(digest_size=12)
    head = (FORMAT_VERSION, version("miditok"), version("symusic"), asdict(spec))
    digest.update(json.dumps(head, sort_keys=True).encode())
    for row in content:
        digest.update(json.dumps(row).encode())
    return f"{spec.name}-{digest.hexdigest()}"


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenized(source: Source, spec: TokenizerSpec, entries: list[Entry], num_workers: int) -> Iterator[Encoded | str]:
    """Every entry's tokens, or the reason why it was refused, in order, from several processes."""
    names = [entry.name for entry in entries]
    if num_workers == 1 or len(names) < 16:
        _start_worker(source, spec)
        yield from map(_tokenize, names)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(num_workers, _start_worker, (source, spec)) as pool:
        yield from pool.imap(_tokenize, names, chunksize=4)


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
    from symusic import Score

    source, tokenizer = _worker
    try:
        score = Score.from_midi(source.read(name))
        if score.to("second").end() > MAX_SECONDS:
            raise Refused(f"longer than {MAX_SECONDS // 3600} hours")
        return encode(tokenizer, score)
    except Refused as refused:
        return str(refused)
    except (RuntimeError, ValueError) as error:
        return f"not a MIDI file that symusic can read: {str(error).splitlines()[0] if str(error) else error!r}"
