"""How much is copied: the longest run of notes that a piece shares with any training piece."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsmr.data.store import TokenStore
from dsmr.data.tokenizer import Performance

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
LONGEST = 2000  # notes; beyond it a piece is simply copied


def training_pitches(tokenizer: Performance, store: TokenStore) -> list[NDArray[np.int64]]:
    """Pitches of every training piece, in the order of their note-ons."""
    found = []
    for number in store.of_split("train"):
        piece = store.pieces[number]
        ids = np.asarray(store.tokens[piece.start : piece.start + piece.length]).astype(np.int64)
        pitches = ids - tokenizer.note_on
        found.append(pitches[(pitches >= 0) & (pitches < 128)])
    return found


def longest_shared(
    pieces: Sequence[NDArray[np.int64]], corpus: Sequence[NDArray[np.int64]], *, transposed: bool = False
) -> list[int]:
    """For each piece, the number of notes in the longest run that a piece of the corpus has too.

    Runs are compared by 64-bit hashes of all their notes: of 10^7 runs a chance match has a probability of 10^-5.

    Args:
        pieces: pitches in order.
        corpus: likewise.
        transposed: compare intervals between notes, so that a run in another key is found too.
    """
    if transposed:
        pieces, corpus = [np.diff(piece) for piece in pieces], [np.diff(piece) for piece in corpus]
    owner = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    longest = np.zeros(len(pieces), np.int64)
    ours, theirs = Runs(pieces), Runs(corpus)
    for length in range(1, LONGEST + 1):
        if length > 1:
            ours.lengthen(length)
            theirs.lengthen(length)
        theirs.keep(_among(theirs.hash, np.unique(ours.hash)))
        ours.keep(_among(ours.hash, np.unique(theirs.hash)))
        if not len(ours.start):
            break
        longest[owner[ours.start]] = length
    return (longest + (longest > 0) * transposed).tolist()  # an interval has two notes


class Runs:
    """All runs of one length in some pieces that may still be shared: where they start, and their hashes."""

    def __init__(self, pieces: Sequence[NDArray[np.int64]]) -> None:
        values = np.concatenate([*pieces, np.empty(0, np.int64)])
        self.notes = _mixed((values + 1000).astype(np.uint64))
        self.left = np.concatenate([*(np.arange(len(piece), 0, -1) for piece in pieces), np.empty(0, np.int64)])
        self.start, self.hash = np.arange(len(values)), self.notes

    def keep(self, which: NDArray[np.bool_]) -> None:
        """Drop all others."""
        self.start, self.hash = self.start[which], self.hash[which]

    def lengthen(self, length: int) -> None:
        """Take one note more, where the piece goes on; `length` counts it."""
        self.keep(self.left[self.start] >= length)
        self.hash = _mixed(self.hash * np.uint64(3) + self.notes[self.start + length - 1])


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(29))) * MULTIPLIER
    made: NDArray[np.uint64] = (values ^ (values >> np.uint64(32))) * MULTIPLIER
    return made


def _among(values: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of many values are among a few sorted ones."""
    if not len(known):
        return np.zeros(len(values), bool)
    place = np.minimum(np.searchsorted(known, values), len(known) - 1)
    found: NDArray[np.bool_] = known[place] == values
    return found
