"""Copying from the training data: the longest run of notes that a piece shares with any training piece."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsmr.data.performance import Performance
from dsmr.data.store import TokenStore

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
LONGEST = 2000  # notes; runs beyond it are reported as this long


def training_pitches(tokenizer: Performance, store: TokenStore) -> list[NDArray[np.int64]]:
    """Pitches of every training piece, in order of their note-ons."""
    pieces = (store.pieces[number] for number in store.of_split("train"))
    ids = (np.asarray(store.tokens[piece.start : piece.start + piece.length]) for piece in pieces)
    found = (part.astype(np.int64) - tokenizer.note_on for part in ids)
    return [pitches[(pitches >= 0) & (pitches < 128)] for pitches in found]


def longest_shared(
    pieces: Sequence[NDArray[np.int64]], corpus: Sequence[NDArray[np.int64]], *, transposed: bool = False
) -> list[int]:
    """Length in notes of the longest run that each piece shares with any piece of the corpus.

    Runs are compared by 64-bit hashes of all their notes: among 10^7 runs, a false match has a probability of 10^-5.
    Pieces are given by their pitches, in order. `transposed` compares the intervals between notes, which also finds
    runs in another key.
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
        theirs.keep(np.isin(theirs.hash, ours.hash))
        ours.keep(np.isin(ours.hash, theirs.hash))
        if not len(ours.start):
            break
        longest[owner[ours.start]] = length
    return (longest + (longest > 0) * transposed).tolist()  # n intervals are n + 1 notes


class Runs:
    """Start and hash of all runs of one length that may still be shared."""

    def __init__(self, pieces: Sequence[NDArray[np.int64]]) -> None:
        values = np.concatenate([*pieces, np.empty(0, np.int64)])
        self.notes = _mixed((values + 1000).astype(np.uint64))
        self.left = np.concatenate([*(np.arange(len(piece), 0, -1) for piece in pieces), np.empty(0, np.int64)])
        self.start, self.hash = np.arange(len(values)), self.notes

    def keep(self, selected: NDArray[np.bool_]) -> None:
        """Drop all runs that are not selected."""
        self.start, self.hash = self.start[selected], self.hash[selected]

    def lengthen(self, length: int) -> None:
        """Extend each run by a note, to `length` notes; drop runs at the end of their piece."""
        self.keep(self.left[self.start] >= length)
        self.hash = _mixed(self.hash * np.uint64(3) + self.notes[self.start + length - 1])


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(29))) * MULTIPLIER
    return (values ^ (values >> np.uint64(32))) * MULTIPLIER
