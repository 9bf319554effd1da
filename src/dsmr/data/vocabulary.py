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


def note_on_mask(tokenizer: MusicTokenizer) -> NDArray[np.bool_]:
    """Mask of the ids that start a note, (V,)."""
    mask = np.zeros(len(tokenizer.vocab), bool)
    for name, id_ in tokenizer.vocab.items():
        mask[id_] = token_type(name) in (*NOTE_ON_TYPES, *INTERVAL_TYPES)
    return mask


def token_families(tokenizer: MusicTokenizer) -> NDArray[np.int64]:
    """Family of every id as an index into `FAMILIES`, (V,)."""
    indices = {kind: index for index, kinds in enumerate(FAMILIES.values()) for kind in kinds}
    other = list(FAMILIES).index("other")
    families = np.zeros(len(tokenizer.vocab), np.int64)
    for name, id_ in tokenizer.vocab.items():
        families[id_] = indices.get(token_type(name), other)
    return families
