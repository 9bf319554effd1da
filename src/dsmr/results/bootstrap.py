"""Confidence intervals over pieces, and paired comparisons of two models.

Tokens within a piece are correlated, so every interval is computed over pieces. Shapes: P pieces, N tables, D draws.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dsmr import UserError
from dsmr.results.piece_table import FloatArray, PieceTable

NUM_DRAWS = 3999  # with one more, both tails hold a whole number of draws
LEVEL = 0.95
MIN_PIECES = 12  # from here on, intervals cover 93 to 97 % in ordinary cases (experiments/intervals)
NO_INTERVAL = f"no interval: fewer than {MIN_PIECES} pieces, or too few of them differ, for reliable coverage"
ROUNDING = 1e-12  # relative deviations below this are rounding errors, not spread
MAX_T = 1e6  # a draw this many standard errors away has no spread of its own


@dataclass(frozen=True)
class Interval:
    """A value over all pieces with its 95 % interval, whose ends are None if no interval can be given."""

    value: float
    low: float | None
    high: float | None
    num_pieces: int  # number of pieces that contribute

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends; None if no interval can be given."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        """Format the value and the interval, if any, as numbers; the width in `spec` applies to the value."""
        spec = spec or ".3f"
        narrow = spec.lstrip("0123456789")
        interval = "" if self.ends is None else " [{:{n}}, {:{n}}]".format(*self.ends, n=narrow)
        return f"{self.value:{spec}}{interval}"


@dataclass(frozen=True)
class Comparison:
    """Two models evaluated on the same pieces."""

    first: str
    second: str
    difference: Interval  # nats per note of the first minus those of the second
    num_pieces: int  # number of shared pieces
    wins: int  # number of pieces on which the first has fewer nats

    def __str__(self) -> str:
        value, ends = self.difference.value, self.difference.ends
        better, worse = (self.first, self.second) if value <= 0 else (self.second, self.first)
        undecided = f"cannot tell {self.first} from {self.second}: {value:+.3f} nats per note"
        pieces = f"on {self.num_pieces} pieces"
        if ends is None:
            return f"{undecided}, {pieces}; too few of them, or too few that differ, for an interval"
        low, high = ends
        if low <= 0 <= high:
            return f"{undecided} [{low:+.3f}, {high:+.3f}], {pieces}"
        least, most = sorted((abs(low), abs(high)))
        won = f"{better} is better than {worse} by {abs(value):.3f} nats per note"
        return f"{won} [{least:.3f}, {most:.3f}], {pieces}"


@lru_cache(maxsize=16)  # all metrics of a table share the draws
def bootstrap_counts(num_pieces: int) -> FloatArray:
    """Draw `num_pieces` pieces with replacement, D times; return how often each was drawn, (D, P)."""
    even = np.full(num_pieces, 1 / num_pieces)
    return np.random.default_rng(0).multinomial(num_pieces, even, size=NUM_DRAWS).astype(np.float64)


def interval_ends(over_NP: FloatArray, under_NP: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Compute the 95 % interval of the ratio `sum(over) / sum(under)` for each of N tables.

    Each end is the wider of two intervals, because each fails where the other holds:

    - Student's t, with the jackknife standard error of a ratio (Cochran, Sampling Techniques, 1977, 6.17) and the
      effective number of pieces, `sum(under)^2 / sum(under^2)` (Kish, 1965), minus one degrees of freedom. It misses
      on one side if a few pieces account for most of the difference.
    - The studentized bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, 12.5), with the
      linearized standard error. It follows skewness, but is slightly too narrow for a few pieces without any.

    `experiments/intervals` measures their coverage.

    Numerators are nats, denominators are tokens or notes, of which every row has at least two above 0. The lower and
    upper ends, (N,), are infinite if more than 2.5 % of the draws have no spread.
    """
    from scipy.special import stdtrit

    num_pieces, tail = over_NP.shape[1], (1 - LEVEL) / 2
    total_N1 = under_NP.sum(axis=1, keepdims=True)
    expected_NP = over_NP.sum(axis=1, keepdims=True) / total_N1 * under_NP
    residual_NP, share_NP = over_NP - expected_NP, under_NP / total_N1
    residual_NP[np.abs(residual_NP) <= ROUNDING * np.abs(expected_NP)] = 0
    jackknife_N = np.sqrt((1 - 1 / num_pieces) * ((residual_NP / (1 - share_NP)) ** 2).sum(axis=1))
    freedom_N = np.maximum(1 / (share_NP**2).sum(axis=1) - 1, 1)
    by_t_N = stdtrit(freedom_N, 1 - tail) * jackknife_N
    error_N = np.sqrt((residual_NP**2).sum(axis=1))
    rank = round(tail * (NUM_DRAWS + 1))
    t_ND = np.partition(studentized_draws(residual_NP, share_NP), (rank - 1, NUM_DRAWS - rank), axis=1)
    below_N, above_N = (np.maximum(t_N * error_N, by_t_N) for t_N in (t_ND[:, -rank], -t_ND[:, rank - 1]))
    value_N, total_N = over_NP.sum(axis=1) / total_N1[:, 0], total_N1[:, 0]
    return value_N - below_N / total_N, value_N + above_N / total_N


def studentized_draws(residual_NP: FloatArray, share_NP: FloatArray) -> FloatArray:
    """Compute the deviation of each draw's ratio from the overall ratio in the draw's own standard errors, (N, D).

    A draw without spread is infinitely far away, or at 0 if its ratio equals the overall one. `residual` is `over`
    minus its expectation given `under`; `share` is each piece's share of the sum of `under`.
    """
    drawn_PD = bootstrap_counts(residual_NP.shape[1]).T
    # t does not depend on the scale of the residuals; scaled to 1, their squares neither overflow nor vanish
    largest_N1 = np.abs(residual_NP).max(axis=1, keepdims=True)
    residual_NP = residual_NP / np.where(largest_N1, largest_N1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        away_ND = (residual_NP @ drawn_PD) / (share_NP @ drawn_PD)
        # sum((residual - away * share)^2) over the drawn pieces, multiplied out: no (N, P, D) array is needed
        cross_ND, shares_ND = (residual_NP * share_NP) @ drawn_PD, share_NP**2 @ drawn_PD
        spread_ND = residual_NP**2 @ drawn_PD - 2 * away_ND * cross_ND + away_ND**2 * shares_ND
        t_ND = away_ND * (share_NP @ drawn_PD) / np.sqrt(np.maximum(spread_ND, 0))
    t_ND[np.isnan(t_ND)] = 0  # 0 / 0: no deviation, or no piece with a denominator was drawn
    far_ND = np.abs(t_ND) > MAX_T
    t_ND[far_ND] = np.copysign(np.inf, t_ND[far_ND])
    return t_ND


def ratio_interval(over_P: FloatArray, under_P: FloatArray, *, is_exp: bool = False) -> Interval | None:
    """Compute `sum(over) / sum(under)` over pieces with its interval; None if the denominator is 0.

    `is_exp` takes the exponential: perplexity instead of nats.
    """
    if not under_P.sum():
        return None
    value, num_pieces = float(over_P.sum() / under_P.sum()), int((under_P > 0).sum())
    low, high = -np.inf, np.inf
    if num_pieces >= MIN_PIECES:
        counts_P = (under_P > 0) | (over_P != 0)
        (low,), (high,) = interval_ends(over_P[None, counts_P], under_P[None, counts_P])
    if is_exp:
        with np.errstate(over="ignore"):
            value, low, high = float(np.exp(value)), np.exp(low), np.exp(high)
    holds = np.isfinite(low) and np.isfinite(high)
    return Interval(value, float(low) if holds else None, float(high) if holds else None, num_pieces)


def missing_interval_note(intervals: Iterable[Interval | None]) -> str | None:
    """Return a note if any value lacks an interval, else None."""
    return NO_INTERVAL if any(one is not None and one.ends is None for one in intervals) else None


def compare_tables(first: str, second: str, a: PieceTable, b: PieceTable) -> Comparison:
    """Compare the nats per note of two named models, paired over the pieces they share.

    UserError if they share no piece, or count different notes in the same pieces (another tokenizer).
    """
    shared = [name for name in a.names if name in set(b.names)]
    if not shared:
        raise UserError(f"{first} and {second} were scored on different pieces")
    a, b = a.select(shared), b.select(shared)
    if not np.array_equal(a.notes_P, b.notes_P):
        raise UserError(f"{first} and {second} were scored on different notes of the same pieces")
    difference = ratio_interval(a.nll_P - b.nll_P, a.notes_P)
    if difference is None:
        raise UserError(f"{first} and {second} were scored on pieces without notes")
    return Comparison(first, second, difference, len(shared), int((a.nll_P < b.nll_P).sum()))
