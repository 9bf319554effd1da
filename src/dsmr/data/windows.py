"""Windows: isolated excerpts without memory, which is what most models of symbolic music are trained on.

Shapes as in `dsmr.data.lanes`; the segment length T is here the length of a window, and every window begins with
an emptied memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from dsmr.data.errors import DataError
from dsmr.data.lanes import Plan

Protocol = Literal["strided", "random"]
Window = tuple[int, int, int, int]
"""Piece, place of its first token, tokens read, tokens of these that are only context."""


@dataclass(frozen=True)
class Windows:
    """Isolated windows instead of streams.

    In training, an epoch predicts every token once: each piece is cut at every T-th token, from an offset that is
    drawn anew, and the windows of all pieces are shuffled.

    Attributes:
        stride: `strided` validation scores so many tokens of each window, its last ones; all others are context,
            at least T - stride tokens but at a piece's beginning. Every token is scored once.
        protocol: of validation and test: `strided`, or `random`: one window of each piece, from a place that is
            drawn once and for all. The latter is how gwinndr/MusicTransformer-Pytorch scored its models on
            MAESTRO: partial, and with little context for a window's first tokens.
    """

    stride: int = 512
    protocol: Protocol = "strided"

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise DataError(f"data.windows.stride is {self.stride}; it must be at least 1 and at most segment_length")
        if self.protocol not in ("strided", "random"):
            raise DataError(f"data.windows.protocol {self.protocol!r} is not one of strided, random")


def plan_training(
    numbers: Sequence[int], lengths: Sequence[int], *, window: int, num_lanes: int, seed: int, epoch: int
) -> Plan:
    """An epoch of shuffled windows over the pieces `numbers`, which have `lengths` tokens (BOS included)."""
    rng = np.random.default_rng([seed, epoch])
    windows = [
        (number, first, last - first, 0)
        for number, length in zip(numbers, lengths, strict=True)
        for first, last in _cuts(length - 1, int(rng.integers(1, window + 1)), window)
    ]
    return _laid([windows[index] for index in rng.permutation(len(windows))], num_lanes)


def plan_strided(numbers: Sequence[int], lengths: Sequence[int], *, window: int, stride: int, num_lanes: int) -> Plan:
    """Windows that score every token once: the first of a piece all of its tokens, the others their last `stride`."""
    windows: list[Window] = []
    for number, length in zip(numbers, lengths, strict=True):
        for scored, last in _cuts(length - 1, window, stride):
            first = max(0, last - window) if scored else 0
            windows.append((number, first, last - first, scored - first))
    return _laid(windows, num_lanes)


def plan_random(numbers: Sequence[int], lengths: Sequence[int], *, window: int, num_lanes: int, seed: int) -> Plan:
    """One window of every piece; a piece that is no longer is read whole."""
    windows: list[Window] = []
    for number, length in zip(numbers, lengths, strict=True):
        count = min(window, length - 1)
        first = int(np.random.default_rng([seed, number]).integers(0, length - count))
        windows.append((number, first, count, 0))
    return _laid(windows, num_lanes)


def _cuts(end: int, first: int, step: int) -> Iterator[tuple[int, int]]:
    """(0, first), (first, first + step), and so on up to `end`."""
    edges = [0, *range(first, end, step), end]
    return pairwise(edges)


def _laid(windows: Sequence[Window], num_lanes: int) -> Plan:
    """Windows side by side in the lanes, row after row; the last row's rest is empty."""
    num_steps = -(-len(windows) // num_lanes)
    table = np.full((num_steps * num_lanes, 4), [-1, 0, 0, 0], dtype=np.int64)
    table[: len(windows)] = windows
    piece_NB, first_NB, count_NB, context_NB = table.reshape(num_steps, num_lanes, 4).transpose(2, 0, 1)
    return Plan(piece_NB, first_NB, count_NB, context_NB, np.ones_like(piece_NB, dtype=bool))
