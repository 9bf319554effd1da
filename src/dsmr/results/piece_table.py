"""`pieces.csv`: the NLL of every evaluated piece, by token family and by position.

Shapes: P pieces, K position ranges, F token families.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsmr import UserError
from dsmr.data.files import atomic_write

PIECES_FILE = "pieces.csv"
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class PieceTable:
    """NLL (nats) and predicted tokens of every piece, by token family and by position range."""

    names: tuple[str, ...]  # of the pieces in their source
    seconds_P: FloatArray  # of evaluated music
    families: tuple[str, ...]  # names of the token families
    nll_PF: FloatArray
    tokens_PF: FloatArray
    starts: tuple[int, ...]  # first position of each range, in tokens
    nll_PK: FloatArray
    tokens_PK: FloatArray

    @classmethod
    def from_sums(
        cls,
        nll_PKF: FloatArray,
        tokens_PKF: FloatArray,
        microseconds_P: FloatArray,
        names: Sequence[str],
        families: Sequence[str],
        starts: Sequence[int],
    ) -> "PieceTable":
        """Build a table from the sums of `PieceNLL`, dropping pieces and position ranges without tokens."""
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
    def nll_P(self) -> FloatArray:
        """Nats of each piece."""
        return self.nll_PF.sum(axis=1)

    @property
    def tokens_P(self) -> FloatArray:
        """Predicted tokens of each piece."""
        return self.tokens_PF.sum(axis=1)

    @property
    def notes_P(self) -> FloatArray:
        """Note onsets of each piece."""
        return self.tokens_PF[:, self.families.index("pitch")]

    def is_complete(self, pieces: Sequence[Any]) -> bool:
        """Return True if every piece of the table was evaluated to its end, given the pieces of the store."""
        predicted = {piece.name: piece.length - 1 for piece in pieces}
        return all(predicted[name] == tokens for name, tokens in zip(self.names, self.tokens_P, strict=True))

    def write(self, path: Path) -> None:
        """Write one row per piece, atomically; raise UserError if that fails."""
        columns = ["piece", "tokens", "notes", "seconds", "nll", "nats_per_note", "perplexity"]
        columns += [f"{quantity}_{family}" for family in self.families for quantity in ("nll", "tokens")]
        columns += [f"{quantity}_from_{start}" for start in self.starts for quantity in ("nll", "tokens")]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for p, name in enumerate(self.names):
            nll, tokens, notes = self.nll_P[p], self.tokens_P[p], self.notes_P[p]
            cells = [name, f"{tokens:.0f}", f"{notes:.0f}", f"{self.seconds_P[p]:.3f}", repr(float(nll))]
            cells += [repr(float(nll / notes)) if notes else "", repr(float(np.exp(nll / tokens)))]
            for nll_N, tokens_N in ((self.nll_PF[p], self.tokens_PF[p]), (self.nll_PK[p], self.tokens_PK[p])):
                for part, count in zip(nll_N, tokens_N, strict=True):
                    cells += [repr(float(part)), f"{count:.0f}"]
            writer.writerow(cells)
        try:
            with atomic_write(path) as file:
                file.write(text.getvalue().encode())
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror or error}); make room there") from error

    @classmethod
    def read(cls, path: Path) -> "PieceTable":
        """Read a table written by `write`; raise UserError if the file is truncated, or is not such a table."""
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            header = list(rows[0])
            families = tuple(c[4:] for c in header if c.startswith("nll_") and not c.startswith("nll_from_"))
            starts = tuple(int(c.removeprefix("nll_from_")) for c in header if c.startswith("nll_from_"))

            def columns(template: str, keys: Sequence[object]) -> FloatArray:
                return np.array([[float(row[template.format(key)]) for key in keys] for row in rows], np.float64)

            names, seconds_P = tuple(row["piece"] for row in rows), columns("{}", ["seconds"])[:, 0]
            by_family = columns("nll_{}", families), columns("tokens_{}", families)
            by_position = columns("nll_from_{}", starts), columns("tokens_from_{}", starts)
            return cls(names, seconds_P, families, *by_family, starts, *by_position)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not a table of pieces written by dsmr validate ({error!r}); write it again"
            ) from error

    def select(self, names: Sequence[str]) -> "PieceTable":
        """Return the rows of the named pieces, in the given order."""
        positions = {name: p for p, name in enumerate(self.names)}
        rows = [positions[name] for name in names]
        parts: dict[str, Any] = {key: part[rows] for key, part in vars(self).items() if isinstance(part, np.ndarray)}
        return replace(self, names=tuple(names), **parts)


def average_tables(tables: Sequence[PieceTable]) -> PieceTable:
    """Average the nats of several models, such as seeds, over the pieces they share; UserError if there are none."""
    shared = [name for name in tables[0].names if all(name in set(table.names) for table in tables)]
    if not shared:
        raise UserError("the seeds were scored on different pieces")
    selected = [table.select(shared) for table in tables]
    nll_PF, nll_PK = (np.mean([getattr(one, key) for one in selected], axis=0) for key in ("nll_PF", "nll_PK"))
    return replace(selected[0], nll_PF=nll_PF, nll_PK=nll_PK)
