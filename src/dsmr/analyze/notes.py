"""Which notes memory helped to foresee: nats that it saved, note by note."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from miditok import MusicTokenizer
from numpy.typing import NDArray
from symusic import Score

from dsmr import UserError
from dsmr.analyze.streams import piece_nll, window_nll
from dsmr.data.tokenizer import decode
from dsmr.data.vocabulary import note_on_mask
from dsmr.model import Backbone

WINDOW_SECONDS = 2.0
FLOAT = NDArray[np.float64]


@dataclass(frozen=True)
class HeardNotes:
    """The notes of a piece in the order of their onsets, and what memory saved in each.

    Attributes:
        pitch_N: MIDI pitch.
        onset_N: seconds.
        duration_N: seconds.
        saved_N: nats: of all tokens since the note before it, up to its own.
        saved_pitch_N: nats of the note's own token alone, which says the pitch.
    """

    pitch_N: NDArray[np.int64]
    onset_N: FLOAT
    duration_N: FLOAT
    saved_N: FLOAT
    saved_pitch_N: FLOAT


@dataclass(frozen=True)
class Place:
    """A stretch of music that memory helped with.

    Attributes:
        start: seconds.
        end: seconds.
        saved: nats, over all its notes.
        num_notes: that begin there.
    """

    start: float
    end: float
    saved: float
    num_notes: int


def heard(backbone: Backbone, tokenizer: MusicTokenizer, ids: Sequence[int]) -> HeardNotes:
    """What memory saved in each note of a piece.

    Args:
        backbone: in evaluation mode, with memory.
        tokenizer: of the ids.
        ids: BOS, events, EOS.

    Raises:
        UserError: the model keeps no memory, or the tokenizer's notes are not those of its tokens.
    """
    if not any(backbone.horizons):
        raise UserError("this model keeps no memory, so that it saved nothing; use one with horizons above 0")
    ids_N = torch.tensor(list(ids), dtype=torch.int64)
    saved_N = (window_nll(backbone, ids_N) - piece_nll(backbone, ids_N)).cpu().double().numpy()
    begins = np.flatnonzero(note_on_mask(tokenizer)[ids_N[1:].numpy()])
    totals = np.concatenate([[0.0], saved_N.cumsum()])
    before = np.concatenate([[0], begins[:-1] + 1])
    notes = in_order(decode(tokenizer, list(ids)))
    if len(notes["pitch"]) != len(begins):
        raise UserError(
            f"the tokens begin {len(begins)} notes, but {len(notes['pitch'])} come back from them; "
            "which note is which cannot be told with this tokenizer"
        )
    return HeardNotes(
        notes["pitch"].astype(np.int64),
        notes["time"].astype(np.float64),
        notes["duration"].astype(np.float64),
        totals[begins + 1] - totals[before],
        saved_N[begins],
    )


def in_order(score: Score) -> dict[str, NDArray[np.float64]]:
    """Notes in the order in which tokens begin them: by onset, then by pitch."""
    notes = score.to("second").tracks[0].notes.numpy()
    ticks = score.tracks[0].notes.numpy()["time"]
    order = np.lexsort([notes["pitch"], ticks])
    return {name: part[order] for name, part in notes.items()}


def places(notes: HeardNotes, count: int = 10, seconds: float = WINDOW_SECONDS) -> list[Place]:
    """The stretches where memory saved most, none of which overlap, the most first."""
    ends = np.searchsorted(notes.onset_N, notes.onset_N + seconds, side="left")
    totals = np.concatenate([[0.0], notes.saved_N.cumsum()])
    saved = totals[ends] - totals[:-1]
    found: list[Place] = []
    for n in np.argsort(-saved, kind="stable"):
        start = float(notes.onset_N[n])
        if len(found) == count or saved[n] <= 0:
            break
        if all(abs(start - other.start) >= seconds for other in found):
            found.append(Place(start, start + seconds, float(saved[n]), int(ends[n] - n)))
    return found
