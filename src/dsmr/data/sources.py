"""Where pieces come from: every source lists its pieces with a split and reads one of them as bytes."""

from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Entry:
    """One piece of a source.

    Attributes:
        name: path within the source, unique.
        split: to which split it belongs.
    """

    name: str
    split: Split


class Source(Protocol):
    """A collection of MIDI files; picklable, since worker processes read from it."""

    @property
    def description(self) -> str:
        """What a person reads in messages."""

    def entries(self) -> list[Entry]:
        """Return all pieces in a fixed order; raises `DataError` where there are none."""

    def read(self, name: str) -> bytes:
        """Bytes of one piece; raises `Refused` where it cannot be read."""
