"""MIDI to token ids and back, through MidiTok.

The default, `performance`, is in `dsmr.data.performance`. Any other MidiTok tokenizer is named by its class, a user's
own by its dotted path. Ids are flat uint16; the special tokens come first, so that PAD is 0. This module imports
neither torch nor Lightning.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from miditok import MusicTokenizer, TokSequence
from symusic import ControlChange, Note, Score, Tempo, TimeSignature, Track

from dsmr import UserError
from dsmr.data.performance import Performance
from dsmr.data.sources import Refused
from dsmr.data.tokenizer_settings import EXTRA_SETTINGS, make_tokenizer, tokenizer_label
from dsmr.data.vocabulary import BOS, EOS, SPECIAL_TOKENS, Ids, note_on_mask

TRACK_START, TRACK_END = "Track_Start", "Track_End"
"""MMM's tokens around a track; dsmr has one track per piece."""


@dataclass(frozen=True)
class TokenizerSpec:
    """Everything that is needed to build a tokenizer again.

    Attributes:
        name: Tokenizer: performance, a MidiTok class with one stream of tokens (REMI, TSD, PerTok, ...), or the dotted
            path of your own class (mytok.Mine).
        config: Arguments of MidiTok's TokenizerConfig, additional_params included; ranges have keys such as "0_4".
            performance takes none.
    """

    name: str = "performance"
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """One piece as tokens, with the statistics that metrics are normalised by.

    Attributes:
        ids: uint16, BOS + events + EOS.
        num_notes: number of note-ons among them.
        seconds: end of the last note as encoded.
        num_unended: notes without an end in the file, which were left out.
    """

    ids: Ids
    num_notes: int
    seconds: float
    pitch_min: int
    pitch_max: int
    num_unended: int = 0


def build_tokenizer(spec: TokenizerSpec) -> MusicTokenizer:
    """Build the MidiTok tokenizer of a spec; equal specs share one.

    Raises `UserError` for an unknown name, a refused setting, several streams, or a tokenizer that cannot decode what
    it encodes.
    """
    return _build(spec.name, json.dumps(spec.config, sort_keys=True))


@lru_cache(maxsize=8)
def _build(name: str, config: str) -> MusicTokenizer:
    settings = json.loads(config)
    if name == "performance":
        if settings:
            raise UserError("data.tokenizer.config: performance is one fixed encoding and takes no settings")
        return Performance()
    tokenizer = make_tokenizer(name, settings)
    check_round_trip(tokenizer, tokenizer_label(name), settings)
    return tokenizer


def check_round_trip(tokenizer: MusicTokenizer, name: str, settings: dict[str, Any]) -> None:
    """Raise `UserError` for a tokenizer that cannot encode and decode a few bars, before anything is prepared."""
    try:
        num_notes = decode(tokenizer, encode(tokenizer, trial_piece(tokenizer)).ids).note_num()
    except Exception as error:  # a library or a user's class may raise anything
        own = {key for keys in EXTRA_SETTINGS.values() for key in keys}
        switches = " or ".join(k for k, on in settings.items() if k.startswith("use_") and on is True and k not in own)
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise UserError(
            f"data.tokenizer: {name} with this config cannot encode a piano piece and decode it again ({reason}); "
            f"{f'set {switches} to false' if switches else 'change its config'}, or choose another tokenizer"
        ) from error
    if not num_notes:
        raise UserError(f"data.tokenizer: {name} with this config decodes no note of a piano piece that it encoded")


def trial_piece(tokenizer: MusicTokenizer) -> Score:
    """Compose a few bars with chords, a repeated note, a rest, pedals, and a second tempo and time signature.

    All pitches are above the tokenizer's lowest one, so that they can be transposed by -1.
    """
    lowest, highest = tokenizer.config.pitch_range
    middle = (lowest + highest) // 2
    score = Score(480)
    score.tempos.extend([Tempo(0, 120), Tempo(480 * 8, 90)])
    score.time_signatures.extend([TimeSignature(0, 4, 4), TimeSignature(480 * 8, 3, 4)])
    track = Track("Piano", 0, False)
    for beat in (0, 1, 1.5, 2, 5, 7.75, 12):
        for step in (0, 3):
            track.notes.append(Note(int(480 * beat), 360, max(middle - step, lowest + 1), 70))
    for down, up in ((0, 2), (5, 7)):
        track.controls.extend([ControlChange(480 * down, 64, 127), ControlChange(480 * up, 64, 0)])
    score.tracks.append(track)
    return Score.from_midi(score.dumps_midi())  # symusic derives pedal intervals when it reads a file


def encode(tokenizer: MusicTokenizer, score: Score) -> Encoded:
    """Encode the piano part of a piece; raises `Refused` if it has no note that the tokenizer can express."""
    gridded = tokenizer.preprocess_score(piano_part(score))
    if not any(len(track.notes) for track in gridded.tracks):
        raise Refused("no note within the tokenizer's pitch range")
    sequence = tokenizer.encode(gridded, no_preprocess_score=True)
    ids = np.asarray(sequence[0].ids if isinstance(sequence, list) else sequence.ids, dtype=np.int64)
    notes = gridded.tracks[0].notes.numpy()
    seconds = gridded.to("second").tracks[0].notes.numpy()
    return Encoded(
        ids=np.concatenate([[BOS], ids, [EOS]]).astype(np.uint16),
        num_notes=int(note_on_mask(tokenizer)[ids].sum()),
        seconds=float((seconds["time"].astype(np.float64) + seconds["duration"]).max()),
        pitch_min=int(notes["pitch"].min()),
        pitch_max=int(notes["pitch"].max()),
    )


def decode(tokenizer: MusicTokenizer, ids: Sequence[int] | Ids) -> Score:
    """Decode tokens to music in one track; skips special tokens."""
    sequence = TokSequence(ids=[int(id_) for id_ in ids if id_ >= len(SPECIAL_TOKENS)])
    tokenizer.complete_sequence(sequence)
    score: Score = tokenizer.decode(sequence if tokenizer.one_token_stream else [sequence])
    for other in score.tracks[1:]:  # one per program, if the tokens name programs
        score.tracks[0].notes.extend(other.notes)
    if len(score.tracks) > 1:
        score.tracks[0].sort()
        score.tracks = type(score.tracks)(score.tracks[:1])
    return score


def open_ended(tokenizer: MusicTokenizer, ids: Sequence[int]) -> list[int]:
    """Strip the tokens that end a piece or its only track (EOS, MMM's `Track_End`)."""
    events = [int(id_) for id_ in ids]
    while events and events[-1] in (EOS, tokenizer.vocab.get(TRACK_END)):
        events.pop()
    return events


def piano_part(score: Score) -> Score:
    """Copy a score with its piano tracks (programs 0-7, no drums) merged into one; raises `Refused` if it has none."""
    tracks = [track for track in score.tracks if len(track.notes)]
    piano = [track for track in tracks if not track.is_drum and track.program < 8]
    if not piano:
        found = sorted({"drums" if track.is_drum else str(track.program) for track in tracks})
        raise Refused(f"no piano notes (programs 0-7); found {', '.join(found)}" if found else "no notes")
    merged = score.copy()
    track = piano[0].copy()
    for other in piano[1:]:
        track.notes.extend(other.notes)
        track.pedals.extend(other.pedals)
        track.controls.extend(other.controls)
    track.sort()
    merged.tracks = type(merged.tracks)([track])
    return merged
