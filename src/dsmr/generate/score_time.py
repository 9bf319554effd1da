"""Time of a score: from ticks to seconds and back by its tempi, and finer ticks."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from symusic import Score

MAX_TICKS_PER_QUARTER = 32_767  # 15 bits in a MIDI file
MIN_TICKS_PER_SECOND = 400  # of an output file: 4 ticks per 10 ms


def seconds_to_ticks(score: Score, seconds: ArrayLike) -> NDArray[np.int64]:
    """Round seconds to ticks of a score; the last tempo continues after the end."""
    tick_N, second_N, per_second_N = _tempo_map(score)
    at = np.searchsorted(second_N, seconds, side="right") - 1
    return np.rint(tick_N[at] + (np.asarray(seconds) - second_N[at]) * per_second_N[at]).astype(np.int64)


def ticks_to_seconds(score: Score, ticks: ArrayLike) -> NDArray[np.float64]:
    """Convert ticks of a score to seconds; the inverse of `seconds_to_ticks`."""
    tick_N, second_N, per_second_N = _tempo_map(score)
    at = np.searchsorted(tick_N, ticks, side="right") - 1
    return second_N[at] + (np.asarray(ticks) - tick_N[at]) / per_second_N[at]


def _tempo_map(score: Score) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Start of each tempo in ticks and in seconds, the first at 0, and its ticks per second."""
    tempos = sorted(((tempo.time, tempo.mspq) for tempo in score.tempos), key=lambda tempo: tempo[0])
    if not tempos or tempos[0][0] > 0:
        tempos = [(0, 500_000), *tempos]  # MIDI's default, 120 BPM
    tick_N, mspq_N = (np.asarray(column, np.float64) for column in zip(*tempos, strict=True))
    per_second_N = 1e6 * score.ticks_per_quarter / mspq_N
    second_N = np.concatenate([[0.0], np.cumsum(np.diff(tick_N) / per_second_N[:-1])])
    return tick_N, second_N, per_second_N


def with_fine_ticks(score: Score) -> Score:
    """Copy a score, with its ticks divided if they are coarser than 10 ms needs at its slowest tempo."""
    slowest = max([tempo.mspq for tempo in score.tempos], default=500_000)
    # a whole number, so that no note of the file moves
    factor = math.ceil(MIN_TICKS_PER_SECOND * slowest / 1e6 / score.ticks_per_quarter)
    factor = max(1, min(factor, MAX_TICKS_PER_QUARTER // score.ticks_per_quarter))
    return score.resample(score.ticks_per_quarter * factor)
