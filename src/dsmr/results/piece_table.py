"""Results by piece: `pieces.csv`, intervals over pieces, and which of two models is better.

Tokens within a piece are correlated, so every interval is over pieces (`ends`). P pieces, K stretches, F families,
N tables, D draws.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsmr import UserError
from dsmr.data.files import replacing

NAME = "pieces.csv"
NUM_DRAWS = 3999  # with one more, both tails are whole numbers of draws
LEVEL = 0.95
FEWEST = 12  # pieces: from here on an interval covers 93 to 97 % of ordinary cases (experiments/intervals)
NO_INTERVAL = f"no interval: fewer than {FEWEST} pieces, or too few of them differ, for reliable coverage"
ROUNDING, FAR = 1e-12, 1e6  # a smaller share of a figure is no spread; so many standard errors mean that there is none
FLOAT = NDArray[np.float64]


@dataclass(frozen=True)
class PieceTable:
    """NLL of every piece, in parts.

    Attributes:
        names: of the pieces in their source.
        seconds_P: of music that was scored.
        families: names of the families of tokens.
        nll_PF: nats, by family.
        tokens_PF: predicted, by family.
        starts: first position of each stretch of a piece, in tokens.
        nll_PK: nats, by stretch.
        tokens_PK: predicted, by stretch.
    """

    names: tuple[str, ...]
    seconds_P: FLOAT
    families: tuple[str, ...]
    nll_PF: FLOAT
    tokens_PF: FLOAT
    starts: tuple[int, ...]
    nll_PK: FLOAT
    tokens_PK: FLOAT

    @classmethod
    def of_sums(
        cls,
        nll_PKF: FLOAT,
        tokens_PKF: FLOAT,
        microseconds_P: FLOAT,
        names: Sequence[str],
        families: Sequence[str],
        starts: Sequence[int],
    ) -> "PieceTable":
        """Out of the sums of `PieceNLL`: the pieces that were scored, the stretches that any reaches."""
        pieces = tokens_PKF.sum(axis=(1, 2)).nonzero()[0]
        nll_PKF, tokens_PKF = nll_PKF[pieces], tokens_PKF[pieces]
        reached = tokens_PKF.sum(axis=(0, 2)).nonzero()[0]
        return cls(
            names=tuple(names[number] for number in pieces),
            seconds_P=microseconds_P[pieces] / 1e6,
            families=tuple(families),
            nll_PF=nll_PKF.sum(axis=1),
            tokens_PF=tokens_PKF.sum(axis=1),
            starts=tuple(starts[k] for k in reached),
            nll_PK=nll_PKF.sum(axis=2)[:, reached],
            tokens_PK=tokens_PKF.sum(axis=2)[:, reached],
        )

    @property
    def nll_P(self) -> FLOAT:
        """Nats."""
        total: FLOAT = self.nll_PF.sum(axis=1)
        return total

    @property
    def tokens_P(self) -> FLOAT:
        """Tokens that were predicted."""
        total: FLOAT = self.tokens_PF.sum(axis=1)
        return total

    @property
    def notes_P(self) -> FLOAT:
        """Notes that begin."""
        notes: FLOAT = self.tokens_PF[:, self.families.index("pitch")]
        return notes

    def is_complete(self, pieces: Sequence[Any]) -> bool:
        """Whether every piece here was scored as a whole; `pieces` of a store have a name and a length in tokens."""
        predicted = {piece.name: piece.length - 1 for piece in pieces}
        return all(predicted[name] == tokens for name, tokens in zip(self.names, self.tokens_P, strict=True))

    def write(self, path: Path) -> None:
        """Write a row for each piece; the file is whole or not there.

        Raises:
            UserError: no room, or no right to write there.
        """
        columns = ["piece", "tokens", "notes", "seconds", "nll", "nats_per_note", "perplexity"]
        columns += [f"{what}_{family}" for family in self.families for what in ("nll", "tokens")]
        columns += [f"{what}_from_{start}" for start in self.starts for what in ("nll", "tokens")]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for p, name in enumerate(self.names):
            nll, tokens, notes = self.nll_P[p], self.tokens_P[p], self.notes_P[p]
            per_note = repr(float(nll / notes)) if notes else ""
            cells = [name, f"{tokens:.0f}", f"{notes:.0f}", f"{self.seconds_P[p]:.3f}", repr(float(nll))]
            cells += [per_note, repr(float(np.exp(nll / tokens)))]
            for nll_N, tokens_N in ((self.nll_PF[p], self.tokens_PF[p]), (self.nll_PK[p], self.tokens_PK[p])):
                for part, count in zip(nll_N, tokens_N, strict=True):
                    cells += [repr(float(part)), f"{count:.0f}"]
            writer.writerow(cells)
        try:
            with replacing(path) as file:
                file.write(text.getvalue().encode())
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror or error}); make room there") from error

    @classmethod
    def read(cls, path: Path) -> "PieceTable":
        """Read what `write` has written.

        Raises:
            UserError: it is something else, or was cut off.
        """
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            header = list(rows[0])
            families = tuple(c[4:] for c in header if c.startswith("nll_") and not c.startswith("nll_from_"))
            starts = tuple(int(c.removeprefix("nll_from_")) for c in header if c.startswith("nll_from_"))

            def columns(template: str, keys: Sequence[object]) -> FLOAT:
                return np.array([[float(row[template.format(key)]) for key in keys] for row in rows], np.float64)

            return cls(
                tuple(row["piece"] for row in rows),
                columns("{}", ["seconds"])[:, 0],
                families,
                columns("nll_{}", families),
                columns("tokens_{}", families),
                starts,
                columns("nll_from_{}", starts),
                columns("tokens_from_{}", starts),
            )
        except (IndexError, KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no table of pieces of dsmr validate ({error!r}); write it again") from error

    def of(self, names: Sequence[str]) -> "PieceTable":
        """The rows of some pieces, in their order."""
        place = {name: p for p, name in enumerate(self.names)}
        rows = [place[name] for name in names]
        parts = (self.seconds_P, self.nll_PF, self.tokens_PF, self.nll_PK, self.tokens_PK)
        seconds_P, nll_PF, tokens_PF, nll_PK, tokens_PK = (part[rows] for part in parts)
        return PieceTable(tuple(names), seconds_P, self.families, nll_PF, tokens_PF, self.starts, nll_PK, tokens_PK)


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval over pieces.

    Attributes:
        value: of all pieces.
        low: lower end; None where no interval holds, and then `high` is None too.
        high: upper end.
        num_pieces: that have anything to say.
    """

    value: float
    low: float | None
    high: float | None
    num_pieces: int

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends; None where no interval holds."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        """Value, and interval if there is one; `spec` is a number's, its width the value's."""
        spec = spec or ".3f"
        narrow = spec.lstrip("0123456789")
        interval = "" if self.ends is None else " [{:{n}}, {:{n}}]".format(*self.ends, n=narrow)
        return f"{self.value:{spec}}{interval}"


@dataclass(frozen=True)
class Comparison:
    """Two models on the same pieces.

    Attributes:
        first: name.
        second: name.
        difference: nats per note that the first has more than the second.
        num_pieces: that both were scored on.
        wins: of these, on how many the first has fewer nats.
    """

    first: str
    second: str
    difference: Interval
    num_pieces: int
    wins: int

    def __str__(self) -> str:
        value, ends = self.difference.value, self.difference.ends
        better, worse = (self.first, self.second) if value <= 0 else (self.second, self.first)
        told = f"cannot tell {self.first} from {self.second}: {value:+.3f} nats per note"
        if ends is None:
            return f"{told}, on {self.num_pieces} pieces; too few of them, or too few that differ, for an interval"
        low, high = ends
        if low <= 0 <= high:
            return f"{told} [{low:+.3f}, {high:+.3f}], on {self.num_pieces} pieces"
        least, most = sorted((abs(low), abs(high)))
        return (
            f"{better} is better than {worse} by {abs(value):.3f} nats per note "
            f"[{least:.3f}, {most:.3f}], on {self.num_pieces} pieces"
        )


@lru_cache(maxsize=16)  # figures of one table share them
def draws(num_pieces: int, seed: int = 0) -> FLOAT:
    """How often each piece is drawn, (D, P): as many pieces as there are, with replacement."""
    even = np.full(num_pieces, 1 / num_pieces)
    return np.random.default_rng(seed).multinomial(num_pieces, even, size=NUM_DRAWS).astype(np.float64)


def ends(over_NP: FLOAT, under_NP: FLOAT) -> tuple[FLOAT, FLOAT]:
    """Return both ends of the 95 % interval of the ratio `sum(over) / sum(under)`, for each of N tables.

    Each end is the wider one of two intervals, because each fails where the other holds:

    - Student's t, with the jackknife standard error of a ratio (Cochran, Sampling Techniques, 1977, 6.17) and the
      effective number of pieces, `sum(under)^2 / sum(under^2)` (Kish, 1965), less one degrees of freedom. Misses on
      one side where few pieces have most of the difference.
    - The studentised bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, 12.5), with the
      linearised standard error. Follows skewness, but is a little too narrow for few pieces without any.

    What they cover is measured in `experiments/intervals`.

    Args:
        over_NP: such as nats.
        under_NP: such as tokens or notes; every row has at least two above 0.

    Returns:
        Lower and upper ends, (N,); infinite where more than 2.5 % of the draws have no spread at all.
    """
    from scipy.special import stdtrit

    num_pieces, tail = over_NP.shape[1], (1 - LEVEL) / 2
    total_N1 = under_NP.sum(axis=1, keepdims=True)
    expected_NP = over_NP.sum(axis=1, keepdims=True) / total_N1 * under_NP
    off_NP, share_NP = over_NP - expected_NP, under_NP / total_N1
    off_NP[np.abs(off_NP) <= ROUNDING * np.abs(expected_NP)] = 0
    jackknife_N = np.sqrt((1 - 1 / num_pieces) * ((off_NP / (1 - share_NP)) ** 2).sum(axis=1))
    freedom_N = np.maximum(1 / (share_NP**2).sum(axis=1) - 1, 1)
    by_t_N = stdtrit(freedom_N, 1 - tail) * jackknife_N
    error_N = np.sqrt((off_NP**2).sum(axis=1))
    rank = round(tail * (NUM_DRAWS + 1))
    t_ND = np.partition(studentised(off_NP, share_NP), (rank - 1, NUM_DRAWS - rank), axis=1)
    below_N, above_N = (np.maximum(t_N * error_N, by_t_N) for t_N in (t_ND[:, -rank], -t_ND[:, rank - 1]))
    value_N, total_N = over_NP.sum(axis=1) / total_N1[:, 0], total_N1[:, 0]
    return value_N - below_N / total_N, value_N + above_N / total_N


def studentised(off_NP: FLOAT, share_NP: FLOAT) -> FLOAT:
    """Return how far each draw's ratio is from that of all pieces, in the draw's own standard errors, (N, D).

    A draw without any spread is infinitely far, or not at all if its ratio is that of all pieces.

    Args:
        off_NP: `over` less what `under` makes expect.
        share_NP: of `under`.
    """
    drawn_PD = draws(off_NP.shape[1]).T
    largest_N1 = np.abs(off_NP).max(axis=1, keepdims=True)
    off_NP = off_NP / np.where(largest_N1, largest_N1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        away_ND = (off_NP @ drawn_PD) / (share_NP @ drawn_PD)
        cross_ND, shares_ND = (off_NP * share_NP) @ drawn_PD, share_NP**2 @ drawn_PD
        spread_ND = off_NP**2 @ drawn_PD - 2 * away_ND * cross_ND + away_ND**2 * shares_ND
        t_ND = away_ND * (share_NP @ drawn_PD) / np.sqrt(np.maximum(spread_ND, 0))
    t_ND[np.isnan(t_ND)] = 0  # not away, or none of the pieces that count was drawn
    far_ND = np.abs(t_ND) > FAR
    t_ND[far_ND] = np.copysign(np.inf, t_ND[far_ND])
    return t_ND


def ratio(over_P: FLOAT, under_P: FLOAT, *, is_exp: bool = False) -> Interval | None:
    """`sum(over) / sum(under)` over pieces, or its exponential; None where there is nothing.

    Args:
        over_P: such as nats.
        under_P: such as tokens or notes.
        is_exp: perplexity in place of nats.
    """
    if not under_P.sum():
        return None
    value, num_pieces = float(over_P.sum() / under_P.sum()), int((under_P > 0).sum())
    low, high = -np.inf, np.inf
    if num_pieces >= FEWEST:
        counts_P = (under_P > 0) | (over_P != 0)
        (low,), (high,) = ends(over_P[None, counts_P], under_P[None, counts_P])
    if is_exp:
        with np.errstate(over="ignore"):
            value, low, high = float(np.exp(value)), np.exp(low), np.exp(high)
    holds = np.isfinite(low) and np.isfinite(high)
    return Interval(value, float(low) if holds else None, float(high) if holds else None, num_pieces)


def why_without(intervals: Iterable[Interval | None]) -> str | None:
    """Why some of the figures have no interval; None where all have one."""
    return NO_INTERVAL if any(found is not None and found.ends is None for found in intervals) else None


def compare(first: str, second: str, a: PieceTable, b: PieceTable) -> Comparison:
    """Nats per note of one model less another's, paired over the pieces that both were scored on.

    Raises:
        UserError: they share no piece, or another tokenizer cut the same pieces into other notes.
    """
    shared = [name for name in a.names if name in set(b.names)]
    if not shared:
        raise UserError(f"{first} and {second} were scored on different pieces")
    a, b = a.of(shared), b.of(shared)
    if not np.array_equal(a.notes_P, b.notes_P):
        raise UserError(f"{first} and {second} were scored on different notes of the same pieces")
    difference = ratio(a.nll_P - b.nll_P, a.notes_P)
    if difference is None:
        raise UserError(f"{first} and {second} were scored on pieces without notes")
    return Comparison(first, second, difference, len(shared), int((a.nll_P < b.nll_P).sum()))


def average(tables: Sequence[PieceTable]) -> PieceTable:
    """The mean of several models' nats, such as those of several seeds, on the pieces that all were scored on.

    Raises:
        UserError: they share no piece.
    """
    shared = [name for name in tables[0].names if all(name in set(table.names) for table in tables)]
    if not shared:
        raise UserError("the seeds were scored on different pieces")
    cut = [table.of(shared) for table in tables]
    first = cut[0]
    return PieceTable(
        first.names,
        first.seconds_P,
        first.families,
        np.mean([table.nll_PF for table in cut], axis=0),
        first.tokens_PF,
        first.starts,
        np.mean([table.nll_PK for table in cut], axis=0),
        first.tokens_PK,
    )
