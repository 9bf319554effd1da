"""Token ids and types: the special tokens, the families of types, and which ids start a note. V vocabulary."""

import numpy as np
from miditok import MusicTokenizer
from numpy.typing import NDArray

Ids = NDArray[np.uint16]
SPECIAL_TOKENS = ["PAD", "BOS", "EOS", "MASK"]
PAD, BOS, EOS, MASK = range(4)
"""Ids of the special tokens, the first of every vocabulary."""
NOTE_ON_TYPES = ("NoteOn", "Pitch")
INTERVAL_TYPES = ("PitchIntervalTime", "PitchIntervalChord")
"""Notes with `use_pitch_intervals`: by their interval from the previous note, or from a chord's lowest note."""
FAMILIES: dict[str, tuple[str, ...]] = {
    "pitch": (*NOTE_ON_TYPES, *INTERVAL_TYPES, "PitchDrum", "NoteOnDrum"),
    "end": ("NoteOff", "NoteOffDrum", "Duration"),
    "time": ("TimeShift", "Rest", "Bar", "Beat", "Position", "MicroTiming", "Pattern"),
    "velocity": ("Velocity",),
    "other": (),
}
"""MidiTok's token types by topic: which note starts, when it ends, when something happens, how loud."""


def token_type(name: str) -> str:
    """Return MidiTok's type of a token name: `NoteOn` for `NoteOn_60`."""
    return name.partition("_")[0]


def _types(tokenizer: MusicTokenizer) -> list[str]:
    return [token_type(name) for name in sorted(tokenizer.vocab, key=tokenizer.vocab.get)]


def note_on_mask(tokenizer: MusicTokenizer) -> NDArray[np.bool_]:
    """Mask of the ids that start a note, (V,)."""
    return np.isin(_types(tokenizer), (*NOTE_ON_TYPES, *INTERVAL_TYPES))


def token_families(tokenizer: MusicTokenizer) -> NDArray[np.int64]:
    """Family of every id as an index into `FAMILIES`, (V,)."""
    indices = {kind: index for index, kinds in enumerate(FAMILIES.values()) for kind in kinds}
    other = list(FAMILIES).index("other")
    return np.array([indices.get(kind, other) for kind in _types(tokenizer)], np.int64)
