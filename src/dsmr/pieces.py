"""Results by piece: `pieces.csv`, intervals over pieces, and which of two models is better.

Pieces, not tokens, are what a test set has many of: tokens of one piece are predicted well or badly together. So
every interval here is a percentile interval of the bootstrap over pieces (Efron, 1979). P pieces, K stretches,
F families.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsmr.files import replacing

NAME = "pieces.csv"
NUM_DRAWS = 4000
LEVEL = 0.95
FEW = 10  # pieces: with fewer, a bootstrap's intervals are far too narrow
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
        """Out of the sums of `dsmr.metrics.PieceNLL`: the pieces that were scored, the stretches that any reaches."""
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
            ValueError: no room, or no right to write there.
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
            raise ValueError(f"cannot write {path} ({error.strerror or error}); make room there") from error

    @classmethod
    def read(cls, path: Path) -> "PieceTable":
        """Read what `write` has written.

        Raises:
            ValueError: it is something else, or was cut off.
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
            raise ValueError(f"{path} is no table of pieces of dsmr validate ({error!r}); write it again") from error

    def of(self, names: Sequence[str]) -> "PieceTable":
        """The rows of some pieces, in their order."""
        place = {name: p for p, name in enumerate(self.names)}
        rows = [place[name] for name in names]
        parts = (self.seconds_P, self.nll_PF, self.tokens_PF, self.nll_PK, self.tokens_PK)
        seconds_P, nll_PF, tokens_PF, nll_PK, tokens_PK = (part[rows] for part in parts)
        return PieceTable(tuple(names), seconds_P, self.families, nll_PF, tokens_PF, self.starts, nll_PK, tokens_PK)


@dataclass(frozen=True)
class Interval:
    """A figure with its interval over pieces.

    Attributes:
        value: of all pieces.
        low: 2.5 % of draws lie below.
        high: 2.5 % of draws lie above.
        num_pieces: that have anything to say; with few of them the interval is far too narrow.
    """

    value: float
    low: float
    high: float
    num_pieces: int

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        """Value, interval, and a mark where the pieces are too few; `spec` as of a number, its width the value's."""
        spec = spec or ".3f"
        ends = spec.lstrip("0123456789")
        few = f" ({self.num_pieces} pieces only)" if self.num_pieces < FEW else ""
        return f"{self.value:{spec}} [{self.low:{ends}}, {self.high:{ends}}]{few}"


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
        low, high = self.difference.low, self.difference.high
        better, worse = (self.first, self.second) if self.difference.value <= 0 else (self.second, self.first)
        least, most = sorted((abs(low), abs(high)))
        few = ", too few for an interval that holds" if self.num_pieces < FEW else ""
        if low <= 0 <= high:
            return (
                f"cannot tell {self.first} from {self.second}: {self.difference.value:+.3f} nats per note "
                f"[{low:+.3f}, {high:+.3f}], on {self.num_pieces} pieces{few}"
            )
        return (
            f"{better} is better than {worse} by {abs(self.difference.value):.3f} nats per note "
            f"[{least:.3f}, {most:.3f}], on {self.num_pieces} pieces{few}"
        )


@lru_cache(maxsize=16)  # figures of one table share them
def draws(num_pieces: int, seed: int = 0) -> NDArray[np.int64]:
    """How often each piece is drawn, (draws, P): as many pieces as there are, with replacement."""
    even = np.full(num_pieces, 1 / num_pieces)
    return np.random.default_rng(seed).multinomial(num_pieces, even, size=NUM_DRAWS)


def ratio(over_P: FLOAT, under_P: FLOAT, *, is_exp: bool = False) -> Interval | None:
    """`sum(over) / sum(under)` over pieces, or its exponential; None where there is nothing.

    A draw that has nothing below the line is left out.

    Args:
        over_P: such as nats.
        under_P: such as tokens or notes.
        is_exp: perplexity in place of nats.
    """
    if not under_P.sum():
        return None
    drawn = draws(len(over_P))
    over, under = drawn @ over_P, drawn @ under_P
    values = over[under > 0] / under[under > 0]
    found = (over_P.sum() / under_P.sum(), *np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    value, low, high = (float(np.exp(x) if is_exp else x) for x in found)
    return Interval(value, low, high, int((under_P > 0).sum()))


def compare(first: str, second: str, a: PieceTable, b: PieceTable) -> Comparison:
    """Nats per note of one model less another's, paired over the pieces that both were scored on.

    Raises:
        ValueError: they share no piece, or another tokenizer cut the same pieces into other notes.
    """
    shared = [name for name in a.names if name in set(b.names)]
    if not shared:
        raise ValueError(f"{first} and {second} were scored on different pieces")
    a, b = a.of(shared), b.of(shared)
    if not np.array_equal(a.notes_P, b.notes_P):
        raise ValueError(f"{first} and {second} were scored on different notes of the same pieces")
    difference = ratio(a.nll_P - b.nll_P, a.notes_P)
    if difference is None:
        raise ValueError(f"{first} and {second} were scored on pieces without notes")
    return Comparison(first, second, difference, len(shared), int((a.nll_P < b.nll_P).sum()))


def average(tables: Sequence[PieceTable]) -> PieceTable:
    """The mean of several models' nats, such as those of several seeds, on the pieces that all were scored on.

    Raises:
        ValueError: they share no piece.
    """
    shared = [name for name in tables[0].names if all(name in set(table.names) for table in tables)]
    if not shared:
        raise ValueError("the seeds were scored on different pieces")
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
