"""Isolated windows without memory, as most models of symbolic music are trained on.

Shapes as in `dsmr.data.lanes`. The segment length T is the length of a window, and every window empties the memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from dsmr import UserError
from dsmr.data.lanes import Plan

Protocol = Literal["strided", "random"]
Window = tuple[int, int, int, int]
"""Piece, position of the first token, number of tokens, and how many of these are context only."""


@dataclass(frozen=True)
class Windows:
    """Isolated windows instead of streams.

    In training, an epoch predicts every token once: each piece is cut at every T-th token from a random offset, and
    the windows of all pieces are shuffled.

    Attributes:
        stride: tokens that `strided` validation scores per window, the last ones. The others, at least T - stride
            except at the start of a piece, are context. Every token is scored once.
        protocol: `strided`, or `random`: one window per piece at a fixed random position, as
            gwinndr/MusicTransformer-Pytorch scored its models on MAESTRO. That is partial, and the first tokens of a
            window have little context. Applies to validation and test.
    """

    stride: int = 512
    protocol: Protocol = "strided"

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise UserError(f"data.windows.stride is {self.stride}; it must be at least 1 and at most segment_length")
        if self.protocol not in ("strided", "random"):
            raise UserError(f"data.windows.protocol {self.protocol!r} is not one of strided, random")


def plan_training_windows(
    numbers: Sequence[int], lengths: Sequence[int], window: int, num_lanes: int, *, seed: int, epoch: int
) -> Plan:
    """Plan an epoch of shuffled windows over the pieces `numbers`, which have `lengths` tokens (BOS included)."""
    rng = np.random.default_rng([seed, epoch])
    windows = [
        (number, first, last - first, 0)
        for number, length in zip(numbers, lengths, strict=True)
        for first, last in _cuts(length - 1, int(rng.integers(1, window + 1)), window)
    ]
    return _fill_lanes([windows[index] for index in rng.permutation(len(windows))], num_lanes)


def plan_strided_windows(
    numbers: Sequence[int], lengths: Sequence[int], window: int, num_lanes: int, *, stride: int
) -> Plan:
    """Plan windows that score every token once: the first of a piece scores all, the others their last `stride`."""
    windows: list[Window] = []
    for number, length in zip(numbers, lengths, strict=True):
        for scored, last in _cuts(length - 1, window, stride):
            first = max(0, last - window) if scored else 0
            windows.append((number, first, last - first, scored - first))
    return _fill_lanes(windows, num_lanes)


def plan_random_windows(
    numbers: Sequence[int], lengths: Sequence[int], window: int, num_lanes: int, *, seed: int
) -> Plan:
    """Plan one window per piece; a piece that is not longer is read whole."""
    windows: list[Window] = []
    for number, length in zip(numbers, lengths, strict=True):
        count = min(window, length - 1)
        first = int(np.random.default_rng([seed, number]).integers(0, length - count))
        windows.append((number, first, count, 0))
    return _fill_lanes(windows, num_lanes)


def _cuts(end: int, first: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield (0, first), (first, first + step), and so on up to `end`."""
    return pairwise([0, *range(first, end, step), end])


def _fill_lanes(windows: Sequence[Window], num_lanes: int) -> Plan:
    """Put windows side by side into the lanes, step after step; the rest of the last step is empty."""
    num_steps = -(-len(windows) // num_lanes)
    table = np.full((num_steps * num_lanes, 4), [-1, 0, 0, 0], dtype=np.int64)
    table[: len(windows)] = windows
    piece_NB, first_NB, count_NB, context_NB = table.reshape(num_steps, num_lanes, 4).transpose(2, 0, 1)
    return Plan(piece_NB, first_NB, count_NB, context_NB, np.ones_like(piece_NB, dtype=bool))
