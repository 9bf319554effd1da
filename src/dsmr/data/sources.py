"""Sources of MIDI files: each lists its pieces with their splits and reads a piece as bytes."""

from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Refused(Exception):  # noqa: N818 (a verdict on one file; the others are kept)
    """A file that cannot be used. The message is the reason, without the file's name."""


@dataclass(frozen=True)
class Entry:
    """One piece of a source.

    Attributes:
        name: path within the source, unique.
        split: train, validation or test.
    """

    name: str
    split: Split


class Source(Protocol):
    """A collection of MIDI files; picklable, because worker processes read from it."""

    @property
    def description(self) -> str:
        """Name of the source in messages."""

    def entries(self) -> list[Entry]:
        """List all pieces in a fixed order; raises `UserError` if there are none."""

    def read(self, name: str) -> bytes:
        """Return the content of one piece; raises `Refused` if it cannot be read."""
