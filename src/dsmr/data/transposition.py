"""Transpose tokens: tables from id to id, and the shifts that keep a piece on the piano. V vocabulary."""

from functools import lru_cache

import numpy as np
from miditok import MusicTokenizer
from numpy.typing import NDArray

from dsmr import UserError
from dsmr.data.tokenizer import decode, encode, trial_piece
from dsmr.data.vocabulary import NOTE_ON_TYPES

PIANO_KEYS = (21, 108)
"""Lowest and highest MIDI pitch of a piano with 88 keys."""


def transposition_tables(tokenizer: MusicTokenizer, semitones: int) -> NDArray[np.uint16]:
    """Build tables that transpose a stream, (2 * semitones + 1, V): row i moves every pitch by i - semitones.

    A pitch that would leave the tokenizer's range keeps its id; `allowed_shifts` avoids such shifts. Raises
    `UserError` if tokens cannot be transposed one by one, because the tokenizer was trained (BPE) or writes a pitch as
    an interval from the previous note (BEAT).
    """
    if tokenizer.is_trained:
        raise UserError("transposition needs single-event tokens; set data.transpose to 0 for a trained tokenizer")
    tables = np.tile(np.arange(len(tokenizer.vocab), dtype=np.uint16), (2 * semitones + 1, 1))
    for name, id_ in tokenizer.vocab.items():
        kind, _, value = name.partition("_")
        if kind in (*NOTE_ON_TYPES, "NoteOff"):
            for row, shift in enumerate(range(-semitones, semitones + 1)):
                tables[row, id_] = tokenizer.vocab.get(f"{kind}_{int(value) + shift}", id_)
    ids = encode(tokenizer, trial_piece(tokenizer)).ids
    down = tables[semitones - 1]
    before, after = (decode(tokenizer, part).tracks[0].notes.numpy()["pitch"] for part in (ids, down[ids]))
    if not np.array_equal(np.sort(before) - 1, np.sort(after)):
        raise UserError(
            "data.transpose: the tokens of data.tokenizer cannot be transposed one by one; set data.transpose to 0"
        )
    return tables


def allowed_shifts(pitch_min: int, pitch_max: int, semitones: int, pitch_range: tuple[int, int]) -> tuple[int, int]:
    """Return the lowest and highest shift of a piece in semitones; 0 is always between them.

    A transposed piece stays within the 88 keys of a piano and the tokenizer's pitches (`pitch_range`). A piece that
    already exceeds the 88 keys on one side keeps its own lowest or highest pitch there as the limit.
    """
    bottom = max(min(PIANO_KEYS[0], pitch_min), pitch_range[0])
    top = min(max(PIANO_KEYS[1], pitch_max), pitch_range[1])
    return max(-semitones, bottom - pitch_min), min(semitones, top - pitch_max)


@lru_cache(maxsize=4096)  # asked for every segment of a piece, and making a generator takes longer than reading it
def random_shift(seed: int, epoch: int, number: int, lowest: int, highest: int) -> int:
    """Draw a piece's shift in semitones from `lowest` to `highest`, a function of (seed, epoch, piece number)."""
    return int(np.random.default_rng([seed, epoch, number]).integers(lowest, highest + 1))
