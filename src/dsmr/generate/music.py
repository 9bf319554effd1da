"""Tokens to a score: the prompt as its file has it, a marker at the seam, then the new music.

                 seam
file    ========  |             a note that ends before the seam is the file's
           =======|==..         a note that sounds at the seam starts as in the file,
tokens            |----         and ends where the network decided
                  |  ===  ===   new notes
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from miditok import MusicTokenizer
from numpy.typing import NDArray
from symusic import ControlChange, Note, Score, TextMeta, Track

from dsmr.data.performance import NUM_PITCHES, TICKS_PER_SECOND, Performance
from dsmr.data.tokenizer import decode
from dsmr.data.vocabulary import EOS
from dsmr.generate.prompt import Prompt, note_ticks, token_ticks
from dsmr.generate.score_time import seconds_to_ticks, ticks_to_seconds, with_fine_ticks

SEAM_MARKER = "dsmr continues"
NOTE_FIELDS = ("time", "duration", "pitch", "velocity")
TICKS_PER_QUARTER = 500
SUSTAIN, MIN_DOWN = 64, 64  # the sustain pedal's controller, and its lowest value that counts as down
PEDALS = (SUSTAIN, 66, 67)
"""Controllers: sustain, sostenuto, soft. The new music needs none, its notes last as long as they sound."""

NoteArrays = dict[str, NDArray[np.int64]]
"""Arrays of equal length, one for each of `NOTE_FIELDS`, in ticks."""


def end_sounding_notes(tokenizer: Performance, prompt: Prompt, ids: Sequence[int], last_tick: int) -> list[int]:
    """Cut new tokens at a tick, and append note-offs there for everything that sounds; keeps an earlier EOS."""
    everything = np.asarray([*prompt.ids, *ids], np.int64)
    tick_N = token_ticks(tokenizer, everything)
    if everything[-1] == EOS and tick_N[-1] <= last_tick:
        return [int(id_) for id_ in ids]
    is_note_N = tokenizer.is_note(everything) & (tick_N < last_tick)
    is_note_N[: len(prompt.ids)] |= tokenizer.is_note(everything[: len(prompt.ids)])
    # up to the last note before the tick: the shifts and velocities after it would have nothing to refer to
    kept = max(len(prompt.ids), 1 + int(np.flatnonzero(is_note_N).max(initial=0)))
    events, sounding = everything[:kept], set()
    for id_ in events[tokenizer.is_note(events)].tolist():
        if tokenizer.note_on <= id_ < tokenizer.note_on + NUM_PITCHES:
            sounding.add(id_ - tokenizer.note_on)
        else:
            sounding.discard(id_ - tokenizer.note_off)
    new = everything[len(prompt.ids) : kept].tolist()
    if sounding:
        whole, rest = divmod(max(last_tick - int(tick_N[kept - 1]), 0), tokenizer.num_shifts)
        new += [tokenizer.shift + tokenizer.num_shifts - 1] * whole
        new += [tokenizer.shift + rest - 1] * (rest > 0)
        new += [tokenizer.note_off + pitch for pitch in sorted(sounding)]
    return new


class NewMusic:
    """Notes that new tokens add to a prompt, for tokenizers whose tokens do not tell the time in ticks of 10 ms.

    Their music is decoded in beats, which last as long as in the prompt's file; without a file, as decoded.
    """

    def __init__(self, tokenizer: MusicTokenizer, prompt: Prompt) -> None:
        self.tokenizer, self.prompt = tokenizer, prompt
        self.known = Counter(note_rows(note_arrays(decode(tokenizer, prompt.ids[1:]))))

    def notes(self, ids: Sequence[int]) -> tuple[NoteArrays, Score]:
        """Return the notes that the prompt's tokens do not have, and the decoded score whose ticks they are in.

        Prompt and new tokens are decoded together, since a bar or position of the prompt continues in the new tokens;
        the prompt's notes are then removed one by one, as a multiset, because a new note may equal one of them.
        """
        music = decode(self.tokenizer, [*self.prompt.ids[1:], *ids])
        everything, known, is_new = note_arrays(music), self.known.copy(), []
        for note in note_rows(everything):
            is_new.append(known[note] == 0)
            known[note] -= known[note] > 0
        return _select(everything, np.asarray(is_new, bool)), music

    def times(self, ids: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Onsets and ends of the new notes in seconds after the seam; negative before it."""
        notes, music = self.notes(ids)
        score = music if self.prompt.score is None else self.prompt.score
        ratio = score.ticks_per_quarter / music.ticks_per_quarter
        start, stop = notes["time"] * ratio, (notes["time"] + notes["duration"]) * ratio
        return ticks_to_seconds(score, start) - self.prompt.seam, ticks_to_seconds(score, stop) - self.prompt.seam

    def reached(self, ids: Sequence[int]) -> float:
        """Return the onset of the last new note in seconds after the seam; 0 if there is none."""
        return max(float(self.times(ids)[0].max(initial=0.0)), 0.0)

    def end(self, ids: Sequence[int], goal: float) -> float:
        """Return the end of the last note that starts before `goal`, in seconds after the seam, at most `goal`."""
        start, stop = self.times(ids)
        return min(max(float(stop[start < goal].max(initial=0.0)), 0.0), goal)


def compose_score(
    tokenizer: MusicTokenizer, prompt: Prompt, ids: Sequence[int], seconds: float | None = None
) -> Score:
    """Join a prompt and the new tokens after it to a score.

    Notes, pedals and tempi before the seam are those of the prompt's file; see the module for notes that sound there.
    Without a file, the music of the tokens at 120 BPM. After `seconds` of new music no note starts or sounds.
    """
    if prompt.score is None:
        return _compose_without_file(tokenizer, decode(tokenizer, [*prompt.ids[1:], *ids]), prompt, seconds)
    score = with_fine_ticks(prompt.score)
    seam = int(seconds_to_ticks(score, prompt.seam))
    track, notes = score.tracks[0], note_arrays(score)
    if isinstance(tokenizer, Performance):
        notes, new = _join_at_seam(score, prompt, notes, note_arrays(decode(tokenizer, [*prompt.ids[1:], *ids])))
    else:
        new = _in_ticks_of(score, *NewMusic(tokenizer, prompt).notes(ids))
        if seconds is not None:
            new = _cut_notes(new, int(seconds_to_ticks(score, prompt.seam + seconds)))
        notes = _select(notes, notes["time"] < seam)
    joined = Track(track.name or "Piano", track.program, is_drum=False)
    joined.notes = _to_symusic({name: np.concatenate([notes[name], new[name]]) for name in NOTE_FIELDS})
    joined.controls.extend(_controls_before(track, seam))
    joined.sort()
    score.tracks = type(score.tracks)([joined])
    for kind in ("tempos", "time_signatures", "key_signatures", "markers"):
        events = getattr(score, kind)
        setattr(score, kind, type(events)([event for event in events if event.time < max(seam, 1)]))
    score.markers.append(TextMeta(seam, SEAM_MARKER))
    return score


def _compose_without_file(tokenizer: MusicTokenizer, music: Score, prompt: Prompt, seconds: float | None) -> Score:
    """Finish a decoded score: ticks of a usual size, the end, and a marker at the seam if there was a prompt."""
    if isinstance(tokenizer, Performance):
        music = music.resample(TICKS_PER_QUARTER)  # a multiple of its own 50: exact
    if seconds is not None and music.tracks:
        cut = _cut_notes(note_arrays(music), int(seconds_to_ticks(music, prompt.seam + seconds)))
        music.tracks[0].notes = _to_symusic(cut)
    if prompt.seam:
        music.markers.append(TextMeta(int(seconds_to_ticks(music, prompt.seam)), SEAM_MARKER))
    return music


def _join_at_seam(
    score: Score, prompt: Prompt, notes: NoteArrays, decoded: NoteArrays
) -> tuple[NoteArrays, NoteArrays]:
    """Return the file's notes before the seam, those that sound there with new ends, and the new notes.

    Both are in the ticks of `score`, the file's with fine ticks, as `notes` are; `decoded` has ticks of 10 ms.
    """
    assert prompt.score is not None
    onset, offset = note_ticks(prompt.score)
    start, stop = decoded["time"], decoded["time"] + decoded["duration"]
    is_whole = bool(offset.max() <= prompt.first_tick)  # nothing of the file comes after the seam: nothing is re-ended
    is_copied = np.ones(len(onset), bool) if is_whole else onset < prompt.first_tick
    # (pitch, onset) identifies a note of `performance`: it starts a pitch at most once per tick
    ends = {(int(p), int(t)): int(e) for p, t, e in zip(decoded["pitch"], start, stop, strict=True)}
    duration = notes["duration"].copy()
    for index in np.flatnonzero(is_copied & (offset >= prompt.first_tick) & (not is_whole)):
        end = ends[int(notes["pitch"][index]), int(onset[index])]
        duration[index] = max(int(seconds_to_ticks(score, end / TICKS_PER_SECOND)) - notes["time"][index], 1)
    is_new = start >= prompt.first_tick
    starts, stops = (seconds_to_ticks(score, tick[is_new] / TICKS_PER_SECOND) for tick in (start, stop))
    new = _select(decoded, is_new) | {"time": starts, "duration": np.maximum(stops - starts, 1)}
    return _select(notes | {"duration": duration}, is_copied), new


def _in_ticks_of(score: Score, notes: NoteArrays, music: Score) -> NoteArrays:
    """Convert notes from ticks of the decoded music to ticks of the file, beat by beat."""
    ratio = score.ticks_per_quarter / music.ticks_per_quarter
    start = np.rint(notes["time"] * ratio).astype(np.int64)
    stop = np.rint((notes["time"] + notes["duration"]) * ratio).astype(np.int64)  # rounded itself, so that none drifts
    return notes | {"time": start, "duration": np.maximum(stop - start, 1)}


def _select(notes: NoteArrays, mask: NDArray[np.bool_]) -> NoteArrays:
    """Return the notes where the mask is True."""
    return {name: values[mask] for name, values in notes.items()}


def _cut_notes(notes: NoteArrays, end: int) -> NoteArrays:
    """Keep the notes that start before a tick, and end all of them there at the latest."""
    kept = _select(notes, notes["time"] < end)
    return kept | {"duration": np.minimum(kept["duration"], end - kept["time"])}


def note_arrays(score: Score) -> NoteArrays:
    """Return the notes of a score's first track; empty arrays if there is no track."""
    if not score.tracks:
        return {name: np.empty(0, np.int64) for name in NOTE_FIELDS}
    found = score.tracks[0].notes.numpy()
    return {name: found[name].astype(np.int64) for name in NOTE_FIELDS}


def note_rows(notes: NoteArrays) -> Iterator[tuple[int, ...]]:
    """Iterate over notes as tuples of `NOTE_FIELDS`."""
    return zip(*(notes[name].tolist() for name in NOTE_FIELDS), strict=True)


def _to_symusic(notes: NoteArrays) -> Any:
    """Convert note arrays to symusic's list of notes."""
    types = zip(NOTE_FIELDS, (np.int32, np.int32, np.int8, np.int8), strict=True)
    return Note.from_numpy(**{name: notes[name].astype(kind) for name, kind in types})


def _controls_before(track: Track, seam: int) -> list[ControlChange]:
    """Return the file's controls before the seam, and lift at the seam every pedal that is down there."""
    # A sustain pedal that the file never lifts is left out. symusic sees no interval in it, so that the notes under it
    # were not read as longer, and it would hold them when the output is played.
    lifted = max([pedal.time + pedal.duration for pedal in track.pedals if pedal.time < seam], default=0)
    before = []
    for control in track.controls:
        stays_down = control.number == SUSTAIN and control.value >= MIN_DOWN and control.time >= lifted
        if control.time < seam and not stays_down:
            before.append(control)
    state = {control.number: control.value for control in before}
    return before + [ControlChange(seam, number, 0) for number in PEDALS if state.get(number, 0) > 0]
