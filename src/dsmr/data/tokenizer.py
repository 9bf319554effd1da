"""MIDI to token ids and back, through MidiTok.

`performance` is the encoding of Performance RNN and Music Transformer (Oore et al. 2018, arXiv 1808.03715; Huang
et al. 2019, arXiv 1809.04281), also Perceiver AR's: 128 note-ons, 128 note-offs, 100 time shifts of 10 ms, 32
velocities. Any other MidiTok tokenizer is chosen by its class name. Ids are flat uint16; the special tokens come
first, so that PAD is 0. No torch, no Lightning in this file.
"""

import difflib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import miditok
import numpy as np
from miditok import MIDILike, MusicTokenizer, TokenizerConfig, TokSequence
from numpy.typing import NDArray
from symusic import Note, Score, Tempo, TimeSignature, Track

from dsmr.data.errors import Refused

SPECIAL_TOKENS = ["PAD", "BOS", "EOS", "MASK"]
PAD, BOS, EOS, MASK = range(4)
NOTE_ON_TYPES = ("NoteOn", "Pitch")
FAMILIES: dict[str, tuple[str, ...]] = {
    "pitch": (*NOTE_ON_TYPES, "PitchDrum", "NoteOnDrum"),
    "end": ("NoteOff", "NoteOffDrum", "Duration"),
    "time": ("TimeShift", "Rest", "Bar", "Position"),
    "velocity": ("Velocity",),
    "other": (),
}
"""What a token is about, by MidiTok's types: which note begins, when one ends, when something happens, how loud."""
TICKS_PER_SECOND = 100

Ids = NDArray[np.uint16]


@dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer: all that is needed to build it again.

    Attributes:
        name: `performance`, or the class name of any MidiTok tokenizer that yields one stream of tokens (REMI,
            TSD, MIDILike, ...).
        config: arguments of MidiTok's `TokenizerConfig`; in YAML and JSON, ranges such as `beat_res` are keyed
            `"0_4"`. `performance` takes none.
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
            raise ValueError("data.tokenizer.config: performance is one fixed encoding and takes no settings")
        return Performance()
    tokenizer_class = getattr(miditok, name, None)
    if not (isinstance(tokenizer_class, type) and issubclass(tokenizer_class, MusicTokenizer)):
        known = sorted(c.__name__ for c in vars(miditok).values() if _is_tokenizer(c))
        raise ValueError(
            f"data.tokenizer.name: {name!r} is neither performance nor a MidiTok tokenizer; known: {', '.join(known)}"
        )
    known = list(inspect.signature(TokenizerConfig).parameters)
    for key in settings:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"data.tokenizer.config: MidiTok has no setting {key!r}{hint}")
    try:
        for key in settings.keys() & {"beat_res", "beat_res_rest"}:
            settings[key] = {tuple(map(int, k.split("_"))): v for k, v in settings[key].items()}
        tokenizer = tokenizer_class(
            TokenizerConfig(**{"use_pitchdrum_tokens": False, **settings, "special_tokens": SPECIAL_TOKENS})
        )
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        raise ValueError(f"data.tokenizer.config: MidiTok's {name} refuses {settings}: {error}") from error
    if tokenizer.is_multi_voc:
        raise ValueError(f"data.tokenizer.name: {name} writes several streams at once; dsmr models a single one")
    return tokenizer


def _is_tokenizer(candidate: object) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, MusicTokenizer) and candidate is not MusicTokenizer


def build_tokenizer(spec: TokenizerSpec) -> MusicTokenizer:
    """MidiTok tokenizer of a spec.

    Raises:
        ValueError: the name is unknown, the settings are refused, or there is more than one stream.
    """
    return _built(spec.name, json.dumps(spec.config, sort_keys=True))


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
    """Music of a token stream; BOS, EOS and other special tokens are passed over."""
    events = [int(id_) for id_ in ids if id_ >= len(SPECIAL_TOKENS)]
    sequence = TokSequence(ids=events)
    tokenizer.complete_sequence(sequence)
    one_stream = tokenizer.config.one_token_stream_for_programs
    return tokenizer.decode(sequence if one_stream else [sequence])


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
        mask[id_] = name.split("_")[0] in NOTE_ON_TYPES
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
        ValueError: the tokenizer was trained (BPE), so that its ids are not single events.
    """
    if tokenizer.is_trained:
        raise ValueError("transposition needs single-event tokens; set data.transpose to 0 for a trained tokenizer")
    names = {id_: name for name, id_ in tokenizer.vocab.items()}
    tables = np.tile(np.arange(len(names), dtype=np.uint16), (2 * semitones + 1, 1))
    for id_, name in names.items():
        kind, _, value = name.partition("_")
        if kind in (*NOTE_ON_TYPES, "NoteOff"):
            for row, shift in enumerate(range(-semitones, semitones + 1)):
                tables[row, id_] = tokenizer.vocab.get(f"{kind}_{int(value) + shift}", id_)
    return tables
