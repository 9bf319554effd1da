"""The token store: all pieces of a source as one memory-mapped file of uint16 ids, with an index beside it.

    <cache>/<key>/tokens.bin   [BOS ids of piece 0 EOS][BOS ids of piece 1 EOS]...
                  marks.bin    generated pieces only: a distance per token, see `dsmr.data.synthetic`
                  index.json   format, tokenizer, pieces (offset and length), refused files with reasons, checksums

The key is a digest of the pieces' content, their splits and the tokenizer's settings. Checksums are verified when a
store is opened. `dsmr.data.store_writer` writes stores.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsmr import UserError
from dsmr.data.sources import Split
from dsmr.data.tokenizer import TokenizerSpec

FORMAT_VERSION = 2
CACHE_VARIABLE = "DSMR_CACHE"
new_digest = partial(hashlib.blake2b, digest_size=16)


def cache_folder(given: str | None) -> Path:
    """Return the folder of token stores: the given one, `$DSMR_CACHE`, or `~/.cache/dsmr`."""
    return Path(given or os.environ.get(CACHE_VARIABLE) or "~/.cache/dsmr").expanduser()


@dataclass(frozen=True)
class Piece:
    """One piece in the store; statistics as in `dsmr.data.tokenizer.Encoded`.

    Attributes:
        start: offset of its BOS in the token file, in tokens.
        length: number of tokens, including BOS and EOS.
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
    """A store on disk, opened for reading; raises `UserError` if it is incomplete, damaged, or of another format.

    Verifying the checksums (`is_checked`) reads the whole store, 0.1 s for MAESTRO.
    """

    def __init__(self, path: Path, *, is_checked: bool = True) -> None:
        self.path = path
        try:
            index = json.loads((path / "index.json").read_text(encoding="utf-8"))
            found = index["format_version"]
            if found != FORMAT_VERSION:
                raise UserError(
                    f"{path} has store format {found}, this version reads {FORMAT_VERSION}; delete it and run dsmr "
                    "prepare again"
                )
            if is_checked:
                check_store(path, index)
            self.description: str = index["source"]
            self.tokenizer_spec = TokenizerSpec(**index["tokenizer"])
            self.pieces = [Piece(**piece) for piece in index["pieces"]]
            self.refused: dict[str, str] = index["refused"]
            self.has_marks: bool = index["marks"]
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not a complete token store ({error}); delete it and run dsmr prepare again"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memory map would copy all tokens to every loader process. The process that pickled it has checked.
        return partial(TokenStore, is_checked=False), (self.path,)

    @cached_property
    def tokens(self) -> NDArray[np.uint16]:
        """All ids, memory-mapped."""
        return np.memmap(self.path / "tokens.bin", np.uint16, "r")

    @cached_property
    def marks(self) -> NDArray[np.uint16] | None:
        """For each token, the distance in tokens to what it repeats, 0 for none; None for a store without marks."""
        return np.memmap(self.path / "marks.bin", np.uint16, "r") if self.has_marks else None

    @property
    def tokens_per_second(self) -> float:
        """Mean number of tokens per second of music over all pieces, without BOS and EOS."""
        return sum(piece.length - 2 for piece in self.pieces) / sum(piece.seconds for piece in self.pieces)

    def of_split(self, split: Split) -> list[int]:
        """Return the numbers of the split's pieces, in the source's order."""
        return [number for number, piece in enumerate(self.pieces) if piece.split == split]


def check_store(path: Path, index: dict[str, Any]) -> None:
    """Verify a store's checksums, that of the index included; raises `UserError` if a file is damaged."""
    found = {"index.json": index_checksum(index)}
    for name in index["checksums"]:
        with (path / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, new_digest).hexdigest()
    for name, checksum in {**index["checksums"], "index.json": index["checksum"]}.items():
        if found[name] != checksum:
            raise UserError(
                f"{path / name} is damaged (checksum {found[name]}, expected {checksum}); delete {path} and run dsmr "
                "prepare again"
            )


def index_checksum(index: dict[str, Any]) -> str:
    """Return the checksum of an index without its own `checksum` entry."""
    rest = {key: value for key, value in index.items() if key != "checksum"}
    return new_digest(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_store(folder: Path) -> bool:
    """Return True for a token store, False for a folder of MIDI files."""
    return all((folder / name).is_file() for name in ("index.json", "tokens.bin"))


def open_store(folder: Path, spec: TokenizerSpec) -> TokenStore:
    """Open a store that was prepared elsewhere; raises `UserError` if it has another tokenizer's tokens."""
    store = TokenStore(folder)
    if store.tokenizer_spec != spec:
        raise UserError(
            f"{folder} was tokenised with {asdict(store.tokenizer_spec)}, but data.tokenizer is {asdict(spec)}; give "
            "the MIDI files, or the tokenizer of the store"
        )
    return store
