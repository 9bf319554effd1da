"""The notes that memory helps to predict: nats saved note by note in one piece."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from miditok import MusicTokenizer
from numpy.typing import NDArray

from dsmr import UserError
from dsmr.analyze.streams import piece_nll, window_nll
from dsmr.data.midi import read_midi
from dsmr.data.sources import Refused
from dsmr.data.tokenizer import decode, encode
from dsmr.data.vocabulary import note_on_mask
from dsmr.model import Backbone

WINDOW_SECONDS = 2.0
FLOAT = NDArray[np.float64]


@dataclass(frozen=True)
class NoteSavings:
    """The notes of a piece in order of their onsets, with the nats that memory saved in each."""

    pitch_N: NDArray[np.int64]  # MIDI pitch
    onset_N: FLOAT  # seconds
    duration_N: FLOAT  # seconds
    saved_N: FLOAT  # over all tokens after the previous note-on, up to and including the note's own
    saved_pitch_N: FLOAT  # of the note-on token alone, which carries the pitch


@dataclass(frozen=True)
class Passage:
    """A stretch of music that memory helped to predict; times in seconds, `saved` in nats over all its notes."""

    start: float
    end: float
    saved: float
    num_notes: int


@dataclass(frozen=True)
class PieceReport:
    """Savings by note in a MIDI file, and the passages in which memory saved most, the most first."""

    path: Path
    notes: NoteSavings
    passages: tuple[Passage, ...]

    def lines(self) -> list[str]:
        """The piece's total and its passages."""
        total, count = float(self.notes.saved_N.sum()), len(self.notes.pitch_N)
        lines = [
            f"{self.path.name}: {count:,} notes, {total:+.1f} nats saved by memory, {total / count:+.3f} per note; "
            "the passages where it saved most:"
        ]
        for rank, one in enumerate(self.passages, start=1):
            span = f"{minutes_seconds(one.start)} to {minutes_seconds(one.end)}"
            lines.append(f"  {rank:>2}.  {span}  {one.saved:7.2f} nats in {one.num_notes} notes")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """All results, for JSON."""
        return {
            "piece": str(self.path),
            "notes": len(self.notes.pitch_N),
            "saved": float(self.notes.saved_N.sum()),
            "places": [asdict(passage) for passage in self.passages],
            "by_note": {name: part.tolist() for name, part in vars(self.notes).items()},
        }


def analyze_piece(backbone: Backbone, tokenizer: MusicTokenizer, path: Path) -> PieceReport:
    """Measure which notes of a MIDI file memory helps to predict; UserError if it is unusable or too short."""
    try:
        score, _ = read_midi(path.expanduser().read_bytes())
        ids = encode(tokenizer, score).ids.tolist()
    except OSError as error:
        raise UserError(f"--piece {path} cannot be read ({error.strerror or error})") from error
    except Refused as refused:
        raise UserError(f"--piece {path} cannot be used: {refused}") from refused
    if len(ids) - 1 <= backbone.segment_length:
        raise UserError(
            f"--piece {path} has {len(ids):,} tokens, which fit into one segment of {backbone.segment_length} and "
            "need no memory; give a longer piece"
        )
    notes = note_savings(backbone, tokenizer, ids)
    return PieceReport(path, notes, tuple(remembered_passages(notes)))


def note_savings(backbone: Backbone, tokenizer: MusicTokenizer, ids: Sequence[int]) -> NoteSavings:
    """Measure the nats that memory saves in each note of a piece, given as ids with BOS and EOS.

    UserError if the model keeps no memory, or the decoded notes do not match the tokens.
    """
    if not any(backbone.horizons):
        raise UserError("this model keeps no memory, so it saves nothing; use one with horizons above 0")
    ids_N = torch.tensor(list(ids), dtype=torch.int64)
    saved_N = (window_nll(backbone, ids_N) - piece_nll(backbone, ids_N)).cpu().double().numpy()
    begins = np.flatnonzero(note_on_mask(tokenizer)[ids_N[1:].numpy()])
    totals = np.concatenate([[0.0], saved_N.cumsum()])
    before = np.concatenate([[0], begins[:-1] + 1])
    score = decode(tokenizer, list(ids))
    notes = score.to("second").tracks[0].notes.numpy()
    # tokens begin notes in the order of their onsets, then of their pitches
    order = np.lexsort([notes["pitch"], score.tracks[0].notes.numpy()["time"]])
    if len(order) != len(begins):
        raise UserError(
            f"the tokens begin {len(begins)} notes, but decode to {len(order)}; this tokenizer does not allow savings "
            "by note"
        )
    onset_N, duration_N = (notes[key][order].astype(np.float64) for key in ("time", "duration"))
    saved_by_note_N = totals[begins + 1] - totals[before]
    return NoteSavings(notes["pitch"][order].astype(np.int64), onset_N, duration_N, saved_by_note_N, saved_N[begins])


def remembered_passages(notes: NoteSavings, count: int = 10) -> list[Passage]:
    """Passages in which memory saved most, without overlaps, the most first."""
    ends = np.searchsorted(notes.onset_N, notes.onset_N + WINDOW_SECONDS, side="left")
    totals = np.concatenate([[0.0], notes.saved_N.cumsum()])
    saved = totals[ends] - totals[:-1]
    found: list[Passage] = []
    for n in np.argsort(-saved, kind="stable"):
        start = float(notes.onset_N[n])
        if len(found) == count or saved[n] <= 0:
            break
        if all(abs(start - other.start) >= WINDOW_SECONDS for other in found):
            found.append(Passage(start, start + WINDOW_SECONDS, float(saved[n]), int(ends[n] - n)))
    return found


def minutes_seconds(seconds: float) -> str:
    """Format a time as minutes and seconds, such as `3:07.5`."""
    return f"{int(seconds // 60)}:{seconds % 60:04.1f}"
