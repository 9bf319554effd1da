"""Excerpts of generated and real pieces as notes, in ticks of 10 ms, with the sustain pedal folded into durations.

Both kinds pass through `performance` tokens, whatever the tokens of the model, so that only the music differs.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from symusic import Score

from dsmr import UserError
from dsmr.data.midi import read_midi
from dsmr.data.performance import TICKS_PER_SECOND, Performance
from dsmr.data.sources import Refused, Split
from dsmr.data.store import TokenStore
from dsmr.data.tokenizer import decode, encode
from dsmr.generate.music import SEAM_MARKER

SUFFIXES = (".mid", ".midi")


@dataclass(frozen=True)
class Excerpt:
    """Notes that begin within a stretch of a piece, sorted by onset and then by pitch."""

    name: str  # of the piece
    seconds: float  # length of the stretch
    onset: NDArray[np.int64] = field(repr=False)  # in ticks of 10 ms from the beginning of the stretch
    duration: NDArray[np.int64] = field(repr=False)  # in ticks
    pitch: NDArray[np.int64] = field(repr=False)
    velocity: NDArray[np.int64] = field(repr=False)
    start: float = 0.0  # seconds of the piece before the stretch
    invalid: int = 0  # number of notes in the file that never end, or begin while their pitch sounds


def read_generated(tokenizer: Performance, folder: Path) -> tuple[list[Excerpt], dict[str, str]]:
    """Read all MIDI files below a folder from the end of their prompts; UserError if none can be used.

    Returns:
        Excerpts, and reasons by name for files that could not be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name one with MIDI files, as dsmr generate --prompt SPLIT writes")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    found, refused = [], {}
    for path in paths:
        name = str(path.relative_to(folder))
        try:
            found.append(read_excerpt(tokenizer, path, name))
        except (Refused, OSError) as error:
            refused[name] = str(error)
    if not found:
        reasons = "".join(f"; {name}: {reason}" for name, reason in list(refused.items())[:3])
        raise UserError(f"{folder} holds no MIDI file that can be used{reasons}")
    return found, refused


def read_excerpt(tokenizer: Performance, path: Path, name: str) -> Excerpt:
    """Read a MIDI file from the marker at the end of its prompt; from the beginning if it has no marker.

    Raises:
        Refused: it cannot be used, or has no note after its prompt.
        OSError: it cannot be read.
    """
    score, num_unended = read_midi(path.read_bytes())
    seams = [marker.time for marker in score.to("second").markers if marker.text == SEAM_MARKER]
    first = round(float(max(seams, default=0.0)) * TICKS_PER_SECOND)
    piece = _whole(tokenizer, encode(tokenizer, score).ids, name)
    end = int((piece.onset + piece.duration).max())
    part = stretch(piece, first, max(end - first, 1))
    if not len(part.onset):
        raise Refused("has no note after its prompt")
    return replace(part, invalid=num_unended + num_overlaps(score))


def num_overlaps(score: Score) -> int:
    """Number of notes that begin while their own pitch sounds in their track."""
    count = 0
    for notes in (track.notes.numpy() for track in score.tracks):
        order = np.lexsort([notes["time"], notes["pitch"]])
        time, pitch = notes["time"][order].astype(np.int64), notes["pitch"][order]
        end = time + notes["duration"][order]
        count += int(((pitch[1:] == pitch[:-1]) & (time[1:] < end[:-1])).sum())
    return count


def read_reference(
    tokenizer: Performance, store: TokenStore, split: Split, start: float, seconds: float
) -> list[Excerpt]:
    """Read the same stretch (in seconds) of every piece of a split that has at least two notes in it.

    UserError if fewer than two pieces are long enough.
    """
    first, length = round(start * TICKS_PER_SECOND), round(seconds * TICKS_PER_SECOND)
    found = []
    for number in store.of_split(split):
        piece = store.pieces[number]
        ids = store.tokens[piece.start : piece.start + piece.length]
        part = stretch(_whole(tokenizer, ids, piece.name), first, length)
        if len(part.onset) > 1:
            found.append(part)
    if len(found) < 2:
        raise UserError(f"fewer than two {split} pieces of {store.description} have music at {start:.0f} s")
    return found


def stretch(piece: Excerpt, first: int, length: int) -> Excerpt:
    """Notes that begin within ticks [first, first + length)."""
    here = (piece.onset >= first) & (piece.onset < first + length)
    notes = piece.onset[here] - first, piece.duration[here], piece.pitch[here], piece.velocity[here]
    return Excerpt(piece.name, length / TICKS_PER_SECOND, *notes, start=first / TICKS_PER_SECOND)


def _whole(tokenizer: Performance, ids: NDArray[np.uint16], name: str) -> Excerpt:
    notes = {key: value.astype(np.int64) for key, value in decode(tokenizer, ids).tracks[0].notes.numpy().items()}
    order = np.lexsort([notes["pitch"], notes["time"]])
    return Excerpt(name, 0.0, *(notes[key][order] for key in ("time", "duration", "pitch", "velocity")))
