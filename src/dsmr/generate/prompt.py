"""Prompts: the tokens that the network reads, and the score that is copied into the output.

A prompt ends at the seam: everything before it is the file's, everything after it is generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from miditok import MusicTokenizer
from numpy.typing import NDArray
from symusic import Score

from dsmr import UserError
from dsmr.data.midi import read_midi
from dsmr.data.performance import TICKS_PER_SECOND, Performance, extend_by_pedal, quantize
from dsmr.data.sources import Refused
from dsmr.data.tokenizer import encode, open_ended, piano_part
from dsmr.data.vocabulary import BOS


@dataclass(frozen=True)
class Prompt:
    """Music to continue."""

    ids: Sequence[int] = (BOS,)  # BOS and events
    first_tick: int = 0  # earliest tick (10 ms) of a new event, for `performance`
    seam: float = 0.0  # second at which the new music starts
    score: "Score | None" = field(default=None, repr=False)  # piano part to copy up to the seam; None without a file

    def last_tick(self, seconds: float) -> int:
        """Return the tick at which `seconds` of new music end; raises `UserError` if they are not positive."""
        if not seconds > 0:
            raise UserError(f"seconds is {seconds}; it must be above 0")
        return self.first_tick + max(round(seconds * TICKS_PER_SECOND), 1)


EMPTY_PROMPT = Prompt()


def read_prompt(tokenizer: MusicTokenizer, file: "str | Path | Score", seconds: float | None = None) -> Prompt:
    """Read the piano part of a MIDI file, or of a score in ticks, up to the seam (default: the end of the piece).

    Raises:
        UserError: the file cannot be read, has no piano notes, or none before the seam.
    """
    name = "the prompt" if isinstance(file, Score) else f"prompt {file}"
    if seconds is not None and not seconds > 0:
        raise UserError(f"prompt_seconds is {seconds}; it must be above 0")
    try:
        score = file if isinstance(file, Score) else read_midi(Path(file).expanduser().read_bytes())[0]
        piano = piano_part(score)
        whole = open_ended(tokenizer, encode(tokenizer, piano).ids.tolist())
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or error})") from error
    except Refused as refused:
        raise UserError(f"{name} cannot be used: {refused}") from refused
    if isinstance(tokenizer, Performance):
        return replace(cut_prompt(tokenizer, whole, seconds, name), score=piano)
    return _cut_by_onsets(tokenizer, piano, whole, seconds, name)


def cut_prompt(tokenizer: Performance, ids: list[int], seconds: float | None, name: str) -> Prompt:
    """Cut `performance` tokens at the seam, behind the last event before it.

    The ids of the prompt are a prefix of the piece's. Notes that sound at the seam have no end in them: the network
    decides when they end.

    `ids` are BOS and events; `name` is for messages, such as the `UserError` if there is no note before the seam.
    """
    tick_N = token_ticks(tokenizer, ids)
    is_event_N = tokenizer.is_note(np.asarray(ids))
    seam = int(tick_N[-1]) if seconds is None else round(seconds * TICKS_PER_SECOND)
    if seam >= tick_N[-1]:
        return Prompt(ids, int(tick_N[-1]), float(tick_N[-1]) / TICKS_PER_SECOND)
    before = np.flatnonzero(is_event_N & (tick_N < seam))
    if not len(before):
        first = tick_N[is_event_N][0] / TICKS_PER_SECOND
        raise UserError(f"{name} has no note in its first {seconds:g} seconds; the first is at {first:.1f} s")
    # The shift that follows is dropped: it may lead past the seam. The grammar makes the network write at least as
    # far.
    return Prompt(ids[: int(before[-1]) + 1], seam, seam / TICKS_PER_SECOND)


def _cut_by_onsets(
    tokenizer: MusicTokenizer, piano: Score, ids: list[int], seconds: float | None, name: str
) -> Prompt:
    """Encode the notes that start before the seam, for tokenizers that write a note's duration with the note."""
    onsets = piano.to("second").tracks[0].notes.numpy()["time"]
    end = float(piano.to("second").end())
    if seconds is None or seconds >= end:
        return Prompt(ids, 0, end, piano)
    is_before = onsets < seconds
    if not is_before.any():
        raise UserError(f"{name} has no note in its first {seconds:g} seconds; the first is at {onsets.min():.1f} s")
    part = piano.copy()
    kept = [note for note, is_kept in zip(part.tracks[0].notes, is_before, strict=True) if is_kept]
    part.tracks[0].notes = type(part.tracks[0].notes)(kept)
    return Prompt(open_ended(tokenizer, encode(tokenizer, part).ids.tolist()), 0, seconds, piano)


def token_ticks(tokenizer: Performance, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Tick (10 ms) of each token: the sum of all shifts up to it, its own included."""
    shift = np.asarray(ids, np.int64) - tokenizer.shift + 1
    return np.where((shift > 0) & (shift <= tokenizer.num_shifts), shift, 0).cumsum()


def note_ticks(piano: Score) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Onset and offset in ticks (10 ms) of each note of a piano part, in its order, as `performance` writes them."""
    track = piano.to("second").tracks[0]
    notes = track.notes.numpy()
    seconds = extend_by_pedal(notes, track.pedals.numpy())
    onset, offset, _, _ = quantize(*seconds, notes["pitch"], notes["velocity"])
    back = np.lexsort([seconds[0], notes["pitch"]]).argsort()  # from the order in which `quantize` returns notes
    return onset[back], offset[back]
