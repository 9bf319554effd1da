"""The music that is continued: what the network reads of it, and what is copied from its file."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from miditok import MusicTokenizer
from numpy.typing import NDArray
from symusic import Score

from dsmr import UserError
from dsmr.data.midi import read_midi
from dsmr.data.performance import extend_by_pedal, quantize
from dsmr.data.sources import Refused
from dsmr.data.tokenizer import (
    BOS,
    TICKS_PER_SECOND,
    Performance,
    encode,
    open_ended,
    piano_part,
)


@dataclass(frozen=True)
class Prompt:
    """What the network has read before it goes on.

    Attributes:
        ids: BOS and events.
        first_tick: no new event comes before it; in ticks of 10 ms, for `performance`.
        seam: where the new music begins, in seconds.
        score: the piano part that is copied up to the seam, in its own ticks; None where there is no file.
    """

    ids: Sequence[int] = (BOS,)
    first_tick: int = 0
    seam: float = 0.0
    score: "Score | None" = field(default=None, repr=False)

    def last_tick(self, seconds: float) -> int:
        """Tick at which so many seconds of new music end.

        Raises:
            UserError: none are asked for.
        """
        if not seconds > 0:
            raise UserError(f"seconds is {seconds}; it must be above 0")
        return self.first_tick + max(round(seconds * TICKS_PER_SECOND), 1)


NOTHING = Prompt()


def read_prompt(tokenizer: MusicTokenizer, file: "str | Path | Score", seconds: float | None = None) -> Prompt:
    """The piano part of a MIDI file up to a seam.

    Args:
        tokenizer: of the network.
        file: a MIDI file or a score in ticks.
        seconds: the seam; None, or more than there are, takes the whole piece.

    Raises:
        UserError: the file cannot be read, has no piano notes, or none before the seam.
    """
    name = "the prompt" if isinstance(file, Score) else f"prompt {file}"
    if seconds is not None and not seconds > 0:
        raise UserError(f"prompt_seconds is {seconds}; it must be above 0")
    try:
        if isinstance(file, Score):
            score = file
        else:
            score, _ = read_midi(Path(file).expanduser().read_bytes())
        piano = piano_part(score)
        whole = open_ended(tokenizer, encode(tokenizer, piano).ids.tolist())
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or error})") from error
    except Refused as refused:
        raise UserError(f"{name} cannot be used: {refused}") from refused
    if isinstance(tokenizer, Performance):
        return replace(cut(tokenizer, whole, seconds, name), score=piano)
    return _clipped(tokenizer, piano, whole, seconds, name)


def cut(tokenizer: Performance, ids: list[int], seconds: float | None, name: str) -> Prompt:
    """The tokens of all events before the seam: a beginning of the piece's own.

    Args:
        tokenizer: of the ids.
        ids: BOS and events.
        seconds: the seam; None, or more than there are, takes the whole piece.
        name: of the piece, for messages.

    Raises:
        UserError: there is no note before the seam.
    """
    tick_N = ticks_of(tokenizer, ids)
    is_event_N = tokenizer.is_note(np.asarray(ids))
    seam = int(tick_N[-1]) if seconds is None else round(seconds * TICKS_PER_SECOND)
    if seam >= tick_N[-1]:
        return Prompt(ids, int(tick_N[-1]), float(tick_N[-1]) / TICKS_PER_SECOND)
    before = np.flatnonzero(is_event_N & (tick_N < seam))
    if not len(before):
        first = tick_N[is_event_N][0] / TICKS_PER_SECOND
        raise UserError(f"{name} has no note in its first {seconds:g} seconds; the first is at {first:.1f} s")
    return Prompt(ids[: int(before[-1]) + 1], seam, seam / TICKS_PER_SECOND)


def _clipped(tokenizer: MusicTokenizer, piano: Score, ids: list[int], seconds: float | None, name: str) -> Prompt:
    """The tokens of all notes that begin before the seam."""
    onsets = piano.to("second").tracks[0].notes.numpy()["time"]
    end = float(piano.to("second").end())
    if seconds is None or seconds >= end:
        return Prompt(ids, 0, end, piano)
    begun = onsets < seconds
    if not begun.any():
        raise UserError(f"{name} has no note in its first {seconds:g} seconds; the first is at {onsets.min():.1f} s")
    part = piano.copy()
    kept = [note for note, is_begun in zip(part.tracks[0].notes, begun, strict=True) if is_begun]
    part.tracks[0].notes = type(part.tracks[0].notes)(kept)
    return Prompt(open_ended(tokenizer, encode(tokenizer, part).ids.tolist()), 0, seconds, piano)


def ticks_of(tokenizer: Performance, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Tick of 10 ms at which each token stands, after the shifts up to and with it."""
    shift = np.asarray(ids, np.int64) - tokenizer.shift + 1
    ticks: NDArray[np.int64] = np.where((shift > 0) & (shift <= tokenizer.num_shifts), shift, 0).cumsum()
    return ticks


def played_ticks(piano: Score) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Onset and offset in ticks of 10 ms of each note of a piano part, in its order, as `performance` writes them."""
    track = piano.to("second").tracks[0]
    notes = track.notes.numpy()
    seconds = extend_by_pedal(notes, track.pedals.numpy())
    onset, offset, _, _ = quantize(*seconds, notes["pitch"], notes["velocity"])
    order = np.lexsort([seconds[0], notes["pitch"]])
    onsets, offsets = np.empty_like(onset), np.empty_like(offset)
    onsets[order], offsets[order] = onset, offset
    return onsets, offsets
