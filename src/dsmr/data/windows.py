"""Isolated windows without memory, as most models of symbolic music are trained on.

Shapes as in `dsmr.data.lanes`. The segment length T is the length of a window, and every window empties the memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from dsmr import UserError
from dsmr.data.lanes import Plan, plan_stream
from dsmr.data.sources import Split

Protocol = Literal["strided", "random"]
Window = tuple[int, int, int, int]
"""Piece, position of the first token, number of tokens, and how many of these are context only."""
Pieces = Sequence[tuple[int, int]]
"""Numbers in the store, and lengths in tokens with BOS."""


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


def plan_epoch(
    numbers: Sequence[int],
    lengths: Sequence[int],
    segment_length: int,
    num_lanes: int,
    epoch: int,
    *,
    windows: Windows | None,
    split: Split,
    seed: int,
) -> Plan:
    """Plan an epoch of a split: windows, or streams in lanes.

    Pieces have `numbers` in the store and `lengths` in tokens, BOS included; `num_lanes` is that of all processes.
    """
    if windows is None:
        return plan_stream(numbers, lengths, segment_length, num_lanes, seed=seed, epoch=epoch)
    pieces = list(zip(numbers, lengths, strict=True))
    if split == "train":
        cut = _training_windows(pieces, segment_length, np.random.default_rng([seed, epoch]))
    elif windows.protocol == "random":
        cut = _random_windows(pieces, segment_length, seed)
    else:
        cut = _strided_windows(pieces, segment_length, windows.stride)
    return _fill_lanes(cut, num_lanes)


def _training_windows(pieces: Pieces, length: int, rng: np.random.Generator) -> list[Window]:
    """Cut every piece at every `length`-th token from a random offset, and shuffle the windows of all pieces."""
    windows = [
        (number, first, last - first, 0)
        for number, tokens in pieces
        for first, last in _cuts(tokens - 1, int(rng.integers(1, length + 1)), length)
    ]
    return [windows[index] for index in rng.permutation(len(windows))]


def _strided_windows(pieces: Pieces, length: int, stride: int) -> list[Window]:
    """Score every token once: the first window of a piece scores all, the others their last `stride`."""
    windows: list[Window] = []
    for number, tokens in pieces:
        for scored, last in _cuts(tokens - 1, length, stride):
            first = max(0, last - length) if scored else 0
            windows.append((number, first, last - first, scored - first))
    return windows


def _random_windows(pieces: Pieces, length: int, seed: int) -> list[Window]:
    """Take one window of every piece; a piece that is not longer is read whole."""
    windows: list[Window] = []
    for number, tokens in pieces:
        count = min(length, tokens - 1)
        first = int(np.random.default_rng([seed, number]).integers(0, tokens - count))
        windows.append((number, first, count, 0))
    return windows


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
