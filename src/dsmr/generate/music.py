"""Tokens to a MIDI file: the prompt as it stands in its own file, a marker at the seam, then the new music."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from miditok import MusicTokenizer
from numpy.typing import ArrayLike, NDArray
from symusic import ControlChange, Note, Score, TextMeta, Track

from dsmr.data.tokenizer import EOS, TICKS_PER_SECOND, Performance, decode
from dsmr.generate.prompt import Prompt, played_ticks, ticks_of

SEAM = "dsmr continues"
NOTE = ("time", "duration", "pitch", "velocity")
TICKS_PER_QUARTER, MAX_TICKS_PER_QUARTER = 500, 32_767
LEAST_RESOLUTION = 400  # ticks per second of a file that is written
SUSTAIN, DOWN = 64, 64  # the control, and its least value that counts as down
PEDALS = (SUSTAIN, 66, 67)  # sustain, sostenuto, soft: the new music is written without them


def closed(tokenizer: Performance, prompt: Prompt, ids: Sequence[int], last_tick: int) -> list[int]:
    """New tokens up to a tick, where all that sounds then is ended; the piece's own end stays if it comes first."""
    everything = np.asarray([*prompt.ids, *ids], np.int64)
    tick_N = ticks_of(tokenizer, everything)
    if everything[-1] == EOS and tick_N[-1] <= last_tick:
        return [int(id_) for id_ in ids]
    is_note_N = tokenizer.is_note(everything) & (tick_N < last_tick)
    is_note_N[: len(prompt.ids)] |= tokenizer.is_note(everything[: len(prompt.ids)])
    kept = int(np.flatnonzero(is_note_N)[-1]) + 1 if is_note_N.any() else 1
    kept = max(kept, len(prompt.ids))
    events, sounding = everything[:kept], set()
    for id_ in events[tokenizer.is_note(events)].tolist():
        if tokenizer.note_on <= id_ < tokenizer.note_on + 128:
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
    """What new tokens add to a prompt, for tokenizers whose tokens do not tell the time in ticks of 10 ms.

    Their music is decoded in beats, which last as long as in the prompt's file; without a file, as decoded.

    Args:
        tokenizer: of the tokens.
        prompt: what was read.
    """

    def __init__(self, tokenizer: MusicTokenizer, prompt: Prompt) -> None:
        self.tokenizer, self.prompt = tokenizer, prompt
        self.known = Counter(rows_of(notes_of(decode(tokenizer, prompt.ids[1:]))))

    def notes(self, ids: Sequence[int]) -> tuple[dict[str, NDArray[np.int64]], Score]:
        """Notes that the prompt's tokens do not have, and the whole decoded score in whose ticks they are."""
        music = decode(self.tokenizer, [*self.prompt.ids[1:], *ids])
        everything, known, is_new = notes_of(music), self.known.copy(), []
        for note in rows_of(everything):
            is_new.append(known[note] == 0)
            known[note] -= known[note] > 0
        return {name: values[np.asarray(is_new, bool)] for name, values in everything.items()}, music

    def times(self, ids: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Onsets and ends of the new notes in seconds after the seam; negative before it."""
        notes, music = self.notes(ids)
        score = music if self.prompt.score is None else self.prompt.score
        ratio = score.ticks_per_quarter / music.ticks_per_quarter
        start, stop = (
            file_seconds(score, tick * ratio) - self.prompt.seam
            for tick in ticks_and_ends(notes["time"], notes["duration"])
        )
        return start, stop

    def reached(self, ids: Sequence[int]) -> float:
        """Seconds after the seam at which the last new note begins; 0 where there is none."""
        return max(float(self.times(ids)[0].max(initial=0.0)), 0.0)

    def end(self, ids: Sequence[int], goal: float) -> float:
        """Seconds after the seam at which the last note ends that begins before the goal, and ends there at last."""
        start, stop = self.times(ids)
        return min(max(float(stop[start < goal].max(initial=0.0)), 0.0), goal)


def compose(tokenizer: MusicTokenizer, prompt: Prompt, ids: Sequence[int], seconds: float | None = None) -> Score:
    """Score of a prompt and the new tokens after it.

    The prompt's notes, pedals and tempi are those of its file, up to the seam. Notes that sound there end where the
    model ends them. Without a file, the tokens' music at 120 BPM.

    Args:
        tokenizer: of the tokens.
        prompt: what was read.
        ids: the tokens after it.
        seconds: of new music, after which no note begins or sounds; None keeps all of it.
    """
    if prompt.score is None:
        return _plain(tokenizer, decode(tokenizer, [*prompt.ids[1:], *ids]), prompt, seconds)
    score = _resolved(prompt.score)
    seam = int(file_ticks(score, prompt.seam))
    track = score.tracks[0]
    notes = {name: values.astype(np.int64) for name, values in track.notes.numpy().items()}
    if isinstance(tokenizer, Performance):
        notes, new = _joined(score, prompt, notes, notes_of(decode(tokenizer, [*prompt.ids[1:], *ids])))
    else:
        new = _added(score, *NewMusic(tokenizer, prompt).notes(ids))
        if seconds is not None:
            new = _cut(new, int(file_ticks(score, prompt.seam + seconds)))
        notes = {name: values[notes["time"] < seam] for name, values in notes.items()}
    made = Track(track.name or "Piano", track.program, is_drum=False)
    made.notes = _as_notes({name: np.concatenate([notes[name], new[name]]) for name in NOTE})
    made.controls.extend(_controls(track, seam))
    made.sort()
    score.tracks = type(score.tracks)([made])
    for kind in ("tempos", "time_signatures", "key_signatures", "markers"):
        events = getattr(score, kind)
        setattr(score, kind, type(events)([event for event in events if event.time < max(seam, 1)]))
    score.markers.append(TextMeta(seam, SEAM))
    return score


def _plain(tokenizer: MusicTokenizer, music: Score, prompt: Prompt, seconds: float | None) -> Score:
    """A decoded score, in ticks of a usual size; with a marker where a prompt of tokens ends."""
    if isinstance(tokenizer, Performance):
        music = _scaled(music, TICKS_PER_QUARTER // music.ticks_per_quarter)
    if seconds is not None and music.tracks:
        cut = _cut(notes_of(music), int(file_ticks(music, prompt.seam + seconds)))
        music.tracks[0].notes = _as_notes(cut)
    if prompt.seam:
        music.markers.append(TextMeta(int(file_ticks(music, prompt.seam)), SEAM))
    return music


def _joined(
    score: Score, prompt: Prompt, notes: dict[str, NDArray[np.int64]], new: dict[str, NDArray[np.int64]]
) -> tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.int64]]]:
    """The file's notes before the seam, those sounding there with new ends, and the new notes, in its ticks."""
    assert prompt.score is not None
    onset, offset = played_ticks(prompt.score)
    ticks = np.asarray(ticks_and_ends(new["time"], new["duration"]))
    is_whole = bool(offset.max() <= prompt.first_tick)
    is_copied = np.ones(len(onset), bool) if is_whole else onset < prompt.first_tick
    ends = {(int(p), int(t)): int(e) for p, t, e in zip(new["pitch"], *ticks, strict=True)}
    duration = notes["duration"].copy()
    for index in np.flatnonzero(is_copied & (offset >= prompt.first_tick) & (not is_whole)):
        end = ends[int(notes["pitch"][index]), int(onset[index])]
        duration[index] = max(int(file_ticks(score, end / TICKS_PER_SECOND)) - notes["time"][index], 1)
    kept = {name: values[is_copied] for name, values in (notes | {"duration": duration}).items()}
    is_new = ticks[0] >= prompt.first_tick
    starts, stops = (file_ticks(score, tick[is_new] / TICKS_PER_SECOND) for tick in ticks)
    added = {name: values[is_new] for name, values in new.items()}
    return kept, added | {"time": starts, "duration": np.maximum(stops - starts, 1)}


def ticks_and_ends(
    time: NDArray[np.int64], duration: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Onsets and ends of notes."""
    return time, time + duration


def _added(score: Score, new: dict[str, NDArray[np.int64]], music: Score) -> dict[str, NDArray[np.int64]]:
    """New notes from ticks of the decoded music to ticks of the file."""
    ratio = score.ticks_per_quarter / music.ticks_per_quarter
    start, stop = (np.rint(tick * ratio).astype(np.int64) for tick in ticks_and_ends(new["time"], new["duration"]))
    return new | {"time": start, "duration": np.maximum(stop - start, 1)}


def _cut(notes: dict[str, NDArray[np.int64]], end: int) -> dict[str, NDArray[np.int64]]:
    """The notes that begin before a tick, none of which sounds there."""
    kept = {name: values[notes["time"] < end] for name, values in notes.items()}
    return kept | {"duration": np.minimum(kept["duration"], end - kept["time"])}


def notes_of(score: Score) -> dict[str, NDArray[np.int64]]:
    """Notes of a score's first track; none where there is no track."""
    if not score.tracks:
        return {name: np.empty(0, np.int64) for name in NOTE}
    found = score.tracks[0].notes.numpy()
    return {name: found[name].astype(np.int64) for name in NOTE}


def rows_of(notes: dict[str, NDArray[np.int64]]) -> Iterator[tuple[int, ...]]:
    """A tuple for each note."""
    return zip(*(notes[name].tolist() for name in NOTE), strict=True)


def _as_notes(notes: dict[str, NDArray[np.int64]]) -> Any:
    """A list of symusic's notes."""
    types = zip(NOTE, (np.int32, np.int32, np.int8, np.int8), strict=True)
    return Note.from_numpy(**{name: notes[name].astype(kind) for name, kind in types})


def _controls(track: Track, seam: int) -> list[ControlChange]:
    """The file's controls before the seam; pedals that are down there are lifted, but one that the file never lifts.

    That one sounds nowhere: it is no interval, and the notes under it were not read as longer.
    """
    lifted = max([pedal.time + pedal.duration for pedal in track.pedals if pedal.time < seam], default=0)
    before = []
    for control in track.controls:
        stays_down = control.number == SUSTAIN and control.value >= DOWN and control.time >= lifted
        if control.time < seam and not stays_down:
            before.append(control)
    state = {control.number: control.value for control in before}
    return before + [ControlChange(seam, number, 0) for number in PEDALS if state.get(number, 0) > 0]


def _resolved(score: Score) -> Score:
    """A copy that tells ticks of 10 ms apart at its slowest tempo; its own ticks, wherever they do, move no note."""
    slowest = max([tempo.mspq for tempo in score.tempos], default=500_000)
    factor = math.ceil(LEAST_RESOLUTION * slowest / 1e6 / score.ticks_per_quarter)
    return _scaled(score, max(1, min(factor, MAX_TICKS_PER_QUARTER // score.ticks_per_quarter)))


def _scaled(score: Score, factor: int) -> Score:
    """The same music in ticks that are so many times shorter."""
    made: Score = score.copy()
    for events in (made.tempos, made.time_signatures, made.key_signatures, made.markers):
        for event in events:
            event.time *= factor
    for track in made.tracks:
        for events in (track.notes, track.pedals, track.controls, track.pitch_bends, track.lyrics):
            for event in events:
                event.time *= factor
        for lasting in (*track.notes, *track.pedals):
            lasting.duration *= factor
    made.ticks_per_quarter = score.ticks_per_quarter * factor
    return made


def file_ticks(score: Score, seconds: ArrayLike) -> NDArray[np.int64]:
    """Ticks of a score at which so many seconds have passed, by its tempi; the last one goes on."""
    tick_N, second_N, per_second_N = _tempo_map(score)
    at = np.searchsorted(second_N, seconds, side="right") - 1
    made: NDArray[np.int64] = np.rint(tick_N[at] + (np.asarray(seconds) - second_N[at]) * per_second_N[at]).astype(
        np.int64
    )
    return made


def file_seconds(score: Score, ticks: ArrayLike) -> NDArray[np.float64]:
    """Seconds at which ticks of a score have passed, by its tempi; the inverse of `file_ticks`."""
    tick_N, second_N, per_second_N = _tempo_map(score)
    at = np.searchsorted(tick_N, ticks, side="right") - 1
    made: NDArray[np.float64] = second_N[at] + (np.asarray(ticks) - tick_N[at]) / per_second_N[at]
    return made


def _tempo_map(score: Score) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Tick and second at which each tempo begins, the first one at 0, and its ticks per second."""
    tempos = sorted(((tempo.time, tempo.mspq) for tempo in score.tempos), key=lambda tempo: tempo[0])
    if not tempos or tempos[0][0] > 0:
        tempos = [(0, 500_000), *tempos]
    tick_N, mspq_N = (np.asarray(column, np.float64) for column in zip(*tempos, strict=True))
    per_second_N = 1e6 * score.ticks_per_quarter / mspq_N
    second_N = np.concatenate([[0.0], np.cumsum(np.diff(tick_N) / per_second_N[:-1])])
    return tick_N, second_N, per_second_N
