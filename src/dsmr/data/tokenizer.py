"""MIDI to token ids and back, through MidiTok.

`performance` is the encoding of Performance RNN and Music Transformer (Oore et al. 2018, arXiv 1808.03715; Huang
et al. 2019, arXiv 1809.04281), also Perceiver AR's: 128 note-ons, 128 note-offs, 100 time shifts of 10 ms, 32
velocities. Any other MidiTok tokenizer is chosen by its class name, one of your own by its dotted path. Ids are flat
uint16; the special tokens come first, so that PAD is 0. No torch, no Lightning in this file.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from miditok import MIDILike, MusicTokenizer, TokenizerConfig, TokSequence
from numpy.typing import NDArray
from symusic import ControlChange, Note, Score, Tempo, TimeSignature, Track

from dsmr import UserError
from dsmr.data.errors import Refused
from dsmr.data.tokenizer_settings import EXTRA_SETTINGS, label, make_tokenizer

SPECIAL_TOKENS = ["PAD", "BOS", "EOS", "MASK"]
PAD, BOS, EOS, MASK = range(4)
NOTE_ON_TYPES = ("NoteOn", "Pitch")
INTERVAL_TYPES = ("PitchIntervalTime", "PitchIntervalChord")
"""With `use_pitch_intervals`: notes by their interval from the note before, or from a chord's lowest note."""
FAMILIES: dict[str, tuple[str, ...]] = {
    "pitch": (*NOTE_ON_TYPES, *INTERVAL_TYPES, "PitchDrum", "NoteOnDrum"),
    "end": ("NoteOff", "NoteOffDrum", "Duration"),
    "time": ("TimeShift", "Rest", "Bar", "Beat", "Position", "MicroTiming", "Pattern"),
    "velocity": ("Velocity",),
    "other": (),
}
"""What a token is about, by MidiTok's types: which note begins, when one ends, when something happens, how loud."""
TICKS_PER_SECOND = 100
TRACK_START, TRACK_END = "Track_Start", "Track_End"
"""What MMM writes around a track, of which there is one here."""

Ids = NDArray[np.uint16]


@dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer: all that is needed to build it again.

    Attributes:
        name: `performance`, the class name of any MidiTok tokenizer that yields one stream of tokens (REMI, TSD,
            MIDILike, PerTok, ...), or the dotted path of a tokenizer class of your own (`mytok.Mine`).
        config: arguments of MidiTok's `TokenizerConfig`, `additional_params` among them; in YAML and JSON, ranges such
            as `beat_res` are keyed `"0_4"`. `performance` takes none.
    """

    name: str = "performance"
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """One piece: ids with BOS and EOS, and what its figures are divided by.

    Attributes:
        ids: uint16, BOS + events + EOS.
        num_notes: note-ons among them.
        seconds: end of the last note as encoded, in seconds.
        pitch_min: lowest MIDI pitch.
        pitch_max: highest.
        num_unended: notes of the file that never end and were left out.
    """

    ids: Ids
    num_notes: int
    seconds: float
    pitch_min: int
    pitch_max: int
    num_unended: int = 0


class Performance(MIDILike):
    """MIDILike with the velocity before a note and only when it changes, and note ends extended by the pedal.

    MidiTok's MIDILike of pitches 0-127 and 50 positions per beat has just the published vocabulary. Here the
    music is first rewritten to one 120 BPM tempo, so that a time shift is 10 ms for any file; a note that ends
    while the sustain pedal is down lasts until the pedal is released or its pitch is struck again, and at least
    one tick; in each tick note-offs come before note-ons, both by rising pitch.
    """

    def __init__(self, tokenizer_config: TokenizerConfig | None = None, params: Any = None, **kwargs: Any) -> None:
        if tokenizer_config is None and params is None:
            tokenizer_config = TokenizerConfig(
                pitch_range=(0, 127),
                beat_res={(0, 2): 50},
                num_velocities=32,
                special_tokens=SPECIAL_TOKENS,
                use_time_signatures=False,
                use_pitchdrum_tokens=False,
            )
        super().__init__(tokenizer_config, params=params, **kwargs)
        offsets = {name: self.vocab[name] for name in ("NoteOn_0", "NoteOff_0")}
        self.note_on, self.note_off = offsets["NoteOn_0"], offsets["NoteOff_0"]
        self.velocity = self.vocab[f"Velocity_{self.velocities[0]}"]
        self.shift = next(id_ for name, id_ in self.vocab.items() if name.startswith("TimeShift_"))
        self.num_shifts = sum(name.startswith("TimeShift_") for name in self.vocab)

    def is_note(self, ids: NDArray[Any]) -> NDArray[np.bool_]:
        """Which ids begin or end a note."""
        ids = ids.astype(np.int64)
        first = min(self.note_on, self.note_off)
        is_within: NDArray[np.bool_] = (ids >= first) & (ids < first + 256)
        return is_within

    def preprocess_score(self, score: Score) -> Score:
        """Rewrite to ticks of 10 ms at 120 BPM, with the pedal folded into the note ends."""
        grid = Score(self.time_division)
        grid.tempos.append(Tempo(0, 120))
        grid.time_signatures.append(TimeSignature(0, 4, 4))
        for track in score.to("second").tracks:
            notes = track.notes.numpy()
            if not len(notes["time"]):
                continue
            played = extend_by_pedal(notes, track.pedals.numpy())
            onset, offset, pitch, velocity = quantize(*played, notes["pitch"], notes["velocity"])
            bins = np.abs(velocity[:, None] - self.velocities[None, :]).argmin(axis=1)
            new = Track(track.name, track.program, track.is_drum)
            new.notes = Note.from_numpy(
                time=onset.astype(np.int32),
                duration=(offset - onset).astype(np.int32),
                pitch=pitch.astype(np.int8),
                velocity=self.velocities[bins].astype(np.int8),
            )
            grid.tracks.append(new)
        return grid

    def _score_to_tokens(
        self, score: Score, attribute_controls_indexes: Any = None
    ) -> TokSequence | list[TokSequence]:
        sequences = [TokSequence(ids=self._track_ids(track).tolist()) for track in score.tracks]
        for sequence in sequences:
            self.complete_sequence(sequence)
        return sequences

    def _track_ids(self, track: Track) -> NDArray[np.int64]:
        notes = {name: values.astype(np.int64) for name, values in track.notes.numpy().items()}
        count = len(notes["time"])
        tick = np.concatenate([notes["time"] + notes["duration"], notes["time"]])
        pitch = np.concatenate([notes["pitch"], notes["pitch"]])
        is_on = np.repeat([False, True], count)
        velocity = np.concatenate([np.zeros(count, np.int64), np.searchsorted(self.velocities, notes["velocity"])])
        order = np.lexsort([pitch, is_on, tick])
        tick, pitch, is_on, velocity = tick[order], pitch[order], is_on[order], velocity[order]

        gap = np.diff(tick, prepend=0)
        num_full, rest = gap // self.num_shifts, gap % self.num_shifts
        struck = np.flatnonzero(is_on)
        changes = np.zeros(len(tick), bool)
        changes[struck] = np.diff(velocity[struck], prepend=-1) != 0
        sizes = num_full + (rest > 0) + changes + 1
        event_at = np.cumsum(sizes) - 1

        ids = np.full(int(sizes.sum()), self.shift + self.num_shifts - 1)
        shift_at = event_at - changes - 1
        ids[shift_at[rest > 0]] = self.shift + rest[rest > 0] - 1
        ids[event_at[changes] - 1] = self.velocity + velocity[changes]
        ids[event_at] = np.where(is_on, self.note_on, self.note_off) + pitch
        return ids

    def _tokens_to_score(
        self, tokens: TokSequence | list[TokSequence], programs: list[tuple[int, bool]] | None = None
    ) -> Score:
        score = Score(self.time_division)
        sequences = [tokens] if isinstance(tokens, TokSequence) else tokens
        for index, sequence in enumerate(sequences):
            program, is_drum = programs[index] if programs else (0, False)
            track = Track("Piano" if program == 0 else "", program, is_drum)
            track.notes.extend(self._notes(sequence.ids))
            track.sort()
            score.tracks.append(track)
        return score

    def _notes(self, ids: Sequence[int]) -> list[Note]:
        """Notes of a token stream; a struck pitch that still sounds, or never ends, is ended."""
        notes: list[Note] = []
        sounding: dict[int, tuple[int, int]] = {}
        tick, velocity = 0, int(self.velocities[len(self.velocities) // 2])

        def end(pitch: int) -> None:
            onset, loudness = sounding.pop(pitch)
            notes.append(Note(onset, max(1, tick - onset), pitch, loudness))

        for id_ in ids:
            if self.shift <= id_ < self.shift + self.num_shifts:
                tick += int(id_) - self.shift + 1
            elif self.velocity <= id_ < self.velocity + len(self.velocities):
                velocity = int(self.velocities[id_ - self.velocity])
            elif self.note_on <= id_ < self.note_on + 128:
                pitch = int(id_) - self.note_on
                if pitch in sounding:
                    end(pitch)
                sounding[pitch] = (tick, velocity)
            elif self.note_off <= id_ < self.note_off + 128 and id_ - self.note_off in sounding:
                end(int(id_) - self.note_off)
        for pitch in list(sounding):
            end(pitch)
        return notes


def extend_by_pedal(
    notes: dict[str, NDArray[Any]], pedals: dict[str, NDArray[Any]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Onsets and offsets in seconds; a note that ends under the pedal lasts until the pedal's release.

    Args:
        notes: symusic's arrays `time`, `duration`, `pitch`, in seconds.
        pedals: symusic's arrays `time`, `duration` of the intervals in which the pedal is down.
    """
    onset = notes["time"].astype(np.float64)
    offset = onset + notes["duration"]
    if len(pedals["time"]):
        order = np.argsort(pedals["time"], kind="stable")
        down = pedals["time"][order].astype(np.float64)
        release = np.maximum.accumulate(down + pedals["duration"][order])
        begins = np.append(True, down[1:] > release[:-1])
        down, release = down[begins], release[np.append(begins[1:], True)]
        last = np.searchsorted(down, offset, side="right") - 1
        under = (last >= 0) & (offset < release[last])
        offset = np.where(under, release[last], offset)
    return onset, offset


def quantize(
    onset: NDArray[np.float64], offset: NDArray[np.float64], pitch: NDArray[Any], velocity: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Ticks of 10 ms, sorted by pitch and onset; no note is lost.

    A note ends at the latest where its pitch is struck again and lasts at least one tick; of two strikes of one
    pitch within a tick the second one moves to the next tick.
    """
    order = np.lexsort([onset, pitch])
    pitch, velocity = pitch[order].astype(np.int64), velocity[order].astype(np.int64)
    start = np.rint(onset[order] * TICKS_PER_SECOND).astype(np.int64)
    stop = np.rint(offset[order] * TICKS_PER_SECOND).astype(np.int64)
    same_pitch = pitch[1:] == pitch[:-1]
    for index in np.flatnonzero(same_pitch & (np.diff(start) <= 0)):
        while index + 1 < len(start) and same_pitch[index] and start[index + 1] <= start[index]:
            start[index + 1] = start[index] + 1
            index += 1
    next_start = np.append(np.where(same_pitch, start[1:], np.iinfo(np.int64).max), np.iinfo(np.int64).max)
    stop = np.minimum(np.maximum(stop, start + 1), next_start[: len(start)])
    return start, stop, pitch, velocity


@lru_cache(maxsize=8)
def _built(name: str, config: str) -> MusicTokenizer:
    settings = json.loads(config)
    if name == "performance":
        if settings:
            raise UserError("data.tokenizer.config: performance is one fixed encoding and takes no settings")
        return Performance()
    tokenizer = make_tokenizer(name, settings, SPECIAL_TOKENS)
    check_way_back(tokenizer, label(name), settings)
    return tokenizer


def build_tokenizer(spec: TokenizerSpec) -> MusicTokenizer:
    """MidiTok tokenizer of a spec.

    Raises:
        UserError: the name is unknown, the settings are refused, there is more than one stream, or the tokenizer
            cannot decode what it encodes.
    """
    return _built(spec.name, json.dumps(spec.config, sort_keys=True))


def check_way_back(tokenizer: MusicTokenizer, name: str, settings: dict[str, Any]) -> None:
    """Encode and decode a few bars, so that a tokenizer that cannot do it is refused before anything is prepared.

    Raises:
        UserError: it raises, or no note is left.
    """
    try:
        num_notes = decode(tokenizer, encode(tokenizer, trial_piece(tokenizer)).ids).note_num()
    except Exception as error:  # whatever a library or a class of the user's own raises
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
    """A few bars with chords, a repeated note, a rest, pedals, another tempo and time signature.

    Its pitches are within the tokenizer's, without the lowest.
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
    return Score.from_midi(score.dumps_midi())


def encode(tokenizer: MusicTokenizer, score: Score) -> Encoded:
    """Ids of the piano part of a piece: its tracks of programs 0-7 that are not drums, merged into one.

    Raises:
        Refused: there is no piano note, or nothing that the tokenizer can express.
    """
    piano = piano_part(score)
    gridded = tokenizer.preprocess_score(piano)
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
    """Music of a token stream, in one track; BOS, EOS and other special tokens are passed over."""
    events = [int(id_) for id_ in ids if id_ >= len(SPECIAL_TOKENS)]
    sequence = TokSequence(ids=events)
    tokenizer.complete_sequence(sequence)
    score: Score = tokenizer.decode(sequence if tokenizer.one_token_stream else [sequence])
    for other in score.tracks[1:]:  # of programs that the tokens name
        score.tracks[0].notes.extend(other.notes)
    if len(score.tracks) > 1:
        score.tracks[0].sort()
        score.tracks = type(score.tracks)(score.tracks[:1])
    return score


def open_ended(tokenizer: MusicTokenizer, ids: Sequence[int]) -> list[int]:
    """Ids of a piece without what says that it, or its only track, ends (EOS, MMM's `Track_End`)."""
    ends = {EOS, tokenizer.vocab.get(TRACK_END)}
    last = len(ids)
    while last and ids[last - 1] in ends:
        last -= 1
    return [int(id_) for id_ in ids[:last]]


def piano_part(score: Score) -> Score:
    """The score with its piano tracks alone (programs 0-7, no drums), merged into one track.

    Raises:
        Refused: there is no piano note.
    """
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


def note_on_mask(tokenizer: MusicTokenizer) -> NDArray[np.bool_]:
    """Which ids begin a note, (V,)."""
    mask = np.zeros(len(tokenizer.vocab), bool)
    for name, id_ in tokenizer.vocab.items():
        mask[id_] = name.split("_")[0] in (*NOTE_ON_TYPES, *INTERVAL_TYPES)
    return mask


def token_families(tokenizer: MusicTokenizer) -> NDArray[np.int64]:
    """What each id is about, (V,): places in `FAMILIES`."""
    kinds = {kind: family for family, kinds in FAMILIES.items() for kind in kinds}
    places = {family: place for place, family in enumerate(FAMILIES)}
    families = np.zeros(len(tokenizer.vocab), np.int64)
    for name, id_ in tokenizer.vocab.items():
        families[id_] = places[kinds.get(name.split("_")[0], "other")]
    return families


def transpositions(tokenizer: MusicTokenizer, semitones: int) -> NDArray[np.uint16]:
    """Tables that transpose a stream, (2 * semitones + 1, V): row i moves every pitch by i - semitones.

    A pitch that leaves the tokenizer's range keeps its id: callers choose shifts that keep a piece in range.

    Raises:
        UserError: tokens cannot be transposed one by one: the tokenizer was trained (BPE), or writes a pitch as an
            interval to the note before (BEAT).
    """
    if tokenizer.is_trained:
        raise UserError("transposition needs single-event tokens; set data.transpose to 0 for a trained tokenizer")
    tables = _tables(tokenizer, range(-semitones, semitones + 1))
    ids = encode(tokenizer, trial_piece(tokenizer)).ids
    (down,) = _tables(tokenizer, [-1])
    before, after = (decode(tokenizer, part).tracks[0].notes.numpy()["pitch"] for part in (ids, down[ids]))
    if not np.array_equal(np.sort(before) - 1, np.sort(after)):
        raise UserError(
            "data.transpose: the tokens of data.tokenizer cannot be transposed one by one; set data.transpose to 0"
        )
    return tables


def _tables(tokenizer: MusicTokenizer, shifts: Sequence[int]) -> NDArray[np.uint16]:
    tables = np.tile(np.arange(len(tokenizer.vocab), dtype=np.uint16), (len(shifts), 1))
    for name, id_ in tokenizer.vocab.items():
        kind, _, value = name.partition("_")
        if kind in (*NOTE_ON_TYPES, "NoteOff"):
            for row, shift in enumerate(shifts):
                tables[row, id_] = tokenizer.vocab.get(f"{kind}_{int(value) + shift}", id_)
    return tables
