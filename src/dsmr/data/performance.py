"""The `performance` encoding of Performance RNN, Music Transformer and Perceiver AR, as a MidiTok tokenizer.

Oore et al. 2018 (arXiv 1808.03715), Huang et al. 2019 (arXiv 1809.04281): 128 note-ons, 128 note-offs, 100 time shifts
of 10 ms, 32 velocities. The ids, after the 4 special tokens:

    4 ... 131    note-on of pitch 0 ... 127        260 ... 291  velocity bin 0 ... 31
    132 ... 259  note-off of pitch 0 ... 127       292 ... 391  time shift of 1 ... 100 ticks of 10 ms
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from miditok import MIDILike, TokenizerConfig, TokSequence
from numpy.typing import NDArray
from symusic import Note, Score, Tempo, TimeSignature, Track

from dsmr.data.vocabulary import SPECIAL_TOKENS

TICKS_PER_SECOND = 100
NUM_PITCHES = 128


class Performance(MIDILike):
    """MIDILike with the velocity before a note and only when it changes, and note ends extended by the pedal.

    MidiTok's MIDILike with pitches 0-127 and 50 positions per beat has exactly the published vocabulary. The music is
    first rewritten to a constant 120 BPM, so that a time shift is 10 ms for any file. A note that ends while the
    sustain pedal is down lasts until the pedal is released or its pitch is struck again, and at least one tick. Within
    a tick, note-offs come before note-ons, both by rising pitch.
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
        self.note_on, self.note_off = self.vocab["NoteOn_0"], self.vocab["NoteOff_0"]
        self.velocity = self.vocab[f"Velocity_{self.velocities[0]}"]
        self.shift = next(id_ for name, id_ in self.vocab.items() if name.startswith("TimeShift_"))
        self.num_shifts = sum(name.startswith("TimeShift_") for name in self.vocab)

    def is_note(self, ids: NDArray[Any]) -> NDArray[np.bool_]:
        """Mask of the ids that start or end a note, which are neighbours."""
        mask: NDArray[np.bool_] = (ids >= self.note_on) & (ids < self.note_on + 2 * NUM_PITCHES)
        return mask

    def preprocess_score(self, score: Score) -> Score:
        """Rewrite a score to ticks of 10 ms at 120 BPM, with the pedal folded into the note ends."""
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
        """Encode a track without a loop over its events: each event is [100-tick shifts][shift][velocity][note]."""
        notes = {name: values.astype(np.int64) for name, values in track.notes.numpy().items()}
        count = len(notes["time"])
        tick = np.concatenate([notes["time"] + notes["duration"], notes["time"]])
        pitch = np.concatenate([notes["pitch"], notes["pitch"]])
        is_on = np.repeat([False, True], count)
        velocity = np.concatenate([np.zeros(count, np.int64), np.searchsorted(self.velocities, notes["velocity"])])
        order = np.lexsort([pitch, is_on, tick])  # the last key sorts first: tick, then note-offs, then pitch
        tick, pitch, is_on, velocity = tick[order], pitch[order], is_on[order], velocity[order]

        gap = np.diff(tick, prepend=0)
        num_full, rest = gap // self.num_shifts, gap % self.num_shifts
        struck = np.flatnonzero(is_on)
        changes = np.zeros(len(tick), bool)
        changes[struck] = np.diff(velocity[struck], prepend=-1) != 0
        sizes = num_full + (rest > 0) + changes + 1
        event_at = np.cumsum(sizes) - 1

        ids = np.full(int(sizes.sum()), self.shift + self.num_shifts - 1)  # what is not overwritten: full shifts
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
        """Decode notes; ends a pitch that is struck again while it sounds, and all that sounds at the end."""
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
            elif self.note_on <= id_ < self.note_on + NUM_PITCHES:
                pitch = int(id_) - self.note_on
                if pitch in sounding:
                    end(pitch)
                sounding[pitch] = (tick, velocity)
            elif self.note_off <= id_ < self.note_off + NUM_PITCHES and id_ - self.note_off in sounding:
                end(int(id_) - self.note_off)
        for pitch in list(sounding):
            end(pitch)
        return notes


def extend_by_pedal(
    notes: dict[str, NDArray[Any]], pedals: dict[str, NDArray[Any]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return onsets and offsets in seconds; a note that ends under the pedal lasts until the pedal's release.

    Takes symusic's arrays, in seconds; pedals are the intervals in which the pedal is down.
    """
    onset = notes["time"].astype(np.float64)
    offset = onset + notes["duration"]
    if len(pedals["time"]):
        order = np.argsort(pedals["time"], kind="stable")
        down = pedals["time"][order].astype(np.float64)
        # Intervals of merged tracks overlap; join them, so that each note needs one lookup.
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
    """Round to ticks of 10 ms, sorted by pitch and onset, without losing a note.

    A note ends at the latest where its pitch is struck again, and lasts at least one tick. Of two strikes of one pitch
    within a tick, the second moves to the next tick.
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
