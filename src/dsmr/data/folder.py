"""Any folder of MIDI files, searched to the bottom, with a split that depends on the pieces alone.

Pieces are ordered by a digest of their content: the first tenth is validation, the next tenth test, the rest
training. Files of the same content always share a split, whatever they are called. A file that is no piano music
takes no place in it; it is refused by name later.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from symusic import Score

from dsmr.data.errors import DataError, Refused
from dsmr.data.maestro import read_bounded
from dsmr.data.pool import each
from dsmr.data.sources import Entry, Split
from dsmr.data.tokenizer import piano_part

SUFFIXES = (".mid", ".midi", ".kar")
HELD_OUT_SHARE = 0.1


class MidiFolder:
    """MIDI files below a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def description(self) -> str:
        """What a person reads in messages."""
        return f"MIDI files in {self.path}"

    def entries(self) -> list[Entry]:
        """Files in the order of their names.

        Raises:
            DataError: fewer than two different readable pieces.
        """
        files = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"no MIDI file ({', '.join(SUFFIXES)}) below {self.path}; give a folder that has some")
        examined = each(digest, [str(path) for path in files])
        digests = dict(zip(files, examined, strict=True))
        usable = sorted({found.hex for found in digests.values() if isinstance(found, Digest)})
        if len(usable) < 2:
            raise DataError(
                f"{self.path} holds {len(usable)} readable piano pieces in {len(files)} MIDI files; "
                "two different ones at least are needed, to train and to validate"
            )
        splits = split_by_digest(usable)
        return [
            Entry(path.relative_to(self.path).as_posix(), splits[found.hex] if isinstance(found, Digest) else "train")
            for path, found in digests.items()
        ]

    def read(self, name: str) -> bytes:
        """Bytes of one file."""
        return read_bounded(self.path / name)


@dataclass(frozen=True)
class Digest:
    """Of a file's content, in hexadecimal digits."""

    hex: str


def digest(path: str) -> Digest | str:
    """Digest of a file's content, or why it is no piano music that can be read."""
    try:
        content = read_bounded(Path(path))
        piano_part(Score.from_midi(content))
    except (Refused, RuntimeError, ValueError) as error:
        return str(error)
    return Digest(hashlib.blake2b(content).hexdigest())


def split_by_digest(digests: list[str]) -> dict[str, Split]:
    """Split of every piece, given their sorted digests: one tenth each is held out, one piece at least."""
    held_out = max(1, round(len(digests) * HELD_OUT_SHARE))
    num_test = held_out if len(digests) > 2 * held_out else 0
    sizes: dict[Split, int] = {"validation": held_out, "test": num_test}
    sizes["train"] = len(digests) - held_out - num_test
    splits = [split for split, size in sizes.items() for _ in range(size)]
    return dict(zip(digests, splits, strict=True))
