"""Tokens to a MIDI file: the prompt as it stands in its own file, a marker at the seam, then the new music."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from miditok import MusicTokenizer
from numpy.typing import ArrayLike, NDArray
from symusic import ControlChange, Note, Score, TextMeta, Track

from dsmr.data.tokenizer import EOS, TICKS_PER_SECOND, Performance, decode
from dsmr.generate.prompt import Prompt, played_ticks, ticks_of

SEAM = "dsmr continues"
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


def compose(tokenizer: MusicTokenizer, prompt: Prompt, ids: Sequence[int]) -> Score:
    """Score of a prompt and the new tokens after it.

    The prompt's notes, pedals and tempi are those of its file, up to the seam. Notes that sound there end where the
    model ends them. Without a file, the tokens' music at 120 BPM.

    Args:
        tokenizer: of the tokens.
        prompt: what was read.
        ids: the tokens after it.
    """
    music = decode(tokenizer, [*prompt.ids[1:], *ids])
    if prompt.score is None:
        return _plain(tokenizer, music, prompt)
    score = _resolved(prompt.score)
    seam = int(file_ticks(score, prompt.seam))
    track = score.tracks[0]
    notes = {name: values.astype(np.int64) for name, values in track.notes.numpy().items()}
    new = {name: values.astype(np.int64) for name, values in music.tracks[0].notes.numpy().items()}
    if isinstance(tokenizer, Performance):
        notes, new = _joined(score, prompt, notes, new)
    else:
        new = _added(tokenizer, score, prompt, new)
        notes = {name: values[notes["time"] < seam] for name, values in notes.items()}
    made = Track(track.name or "Piano", track.program, is_drum=False)
    made.notes = Note.from_numpy(
        time=np.concatenate([notes["time"], new["time"]]).astype(np.int32),
        duration=np.concatenate([notes["duration"], new["duration"]]).astype(np.int32),
        pitch=np.concatenate([notes["pitch"], new["pitch"]]).astype(np.int8),
        velocity=np.concatenate([notes["velocity"], new["velocity"]]).astype(np.int8),
    )
    made.controls.extend(_controls(track, seam))
    made.sort()
    score.tracks = type(score.tracks)([made])
    for kind in ("tempos", "time_signatures", "key_signatures", "markers"):
        events = getattr(score, kind)
        setattr(score, kind, type(events)([event for event in events if event.time < max(seam, 1)]))
    score.markers.append(TextMeta(seam, SEAM))
    return score


def _plain(tokenizer: MusicTokenizer, music: Score, prompt: Prompt) -> Score:
    """A decoded score as it is, in ticks of a usual size; with a marker where a prompt of tokens ends."""
    if isinstance(tokenizer, Performance):
        music = _scaled(music, TICKS_PER_QUARTER // music.ticks_per_quarter)
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


def _added(
    tokenizer: MusicTokenizer, score: Score, prompt: Prompt, everything: dict[str, NDArray[np.int64]]
) -> dict[str, NDArray[np.int64]]:
    """The notes that the prompt's tokens do not have, from beats of the tokenizer to ticks of the file."""
    read = decode(tokenizer, prompt.ids[1:])
    names = ("time", "duration", "pitch", "velocity")
    old = {name: values.astype(np.int64) for name, values in read.tracks[0].notes.numpy().items()}
    known = Counter(zip(*(old[name].tolist() for name in names), strict=True))
    is_new = []
    for note in zip(*(everything[name].tolist() for name in names), strict=True):
        is_new.append(known[note] == 0)
        known[note] -= known[note] > 0
    ratio = score.ticks_per_quarter / read.ticks_per_quarter
    added = {name: values[np.asarray(is_new, bool)] for name, values in everything.items()}
    start, stop = (np.rint(tick * ratio).astype(np.int64) for tick in ticks_and_ends(added["time"], added["duration"]))
    return added | {"time": start, "duration": np.maximum(stop - start, 1)}


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
    tempos = sorted(((tempo.time, tempo.mspq) for tempo in score.tempos), key=lambda tempo: tempo[0])
    if not tempos or tempos[0][0] > 0:
        tempos = [(0, 500_000), *tempos]
    tick_N, mspq_N = (np.asarray(column, np.float64) for column in zip(*tempos, strict=True))
    per_second_N = 1e6 * score.ticks_per_quarter / mspq_N
    second_N = np.concatenate([[0.0], np.cumsum(np.diff(tick_N) / per_second_N[:-1])])
    at = np.searchsorted(second_N, seconds, side="right") - 1
    made: NDArray[np.int64] = np.rint(tick_N[at] + (np.asarray(seconds) - second_N[at]) * per_second_N[at]).astype(
        np.int64
    )
    return made
