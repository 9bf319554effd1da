"""Excerpts of pieces as notes, generated and real ones alike: in ticks of 10 ms, the pedal folded into the lengths.

Both go through the `performance` tokens, whatever a model's own tokens are, so that nothing but the music differs.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsmr import UserError
from dsmr.data.errors import Refused
from dsmr.data.midi import read_midi
from dsmr.data.sources import Split
from dsmr.data.store import TokenStore
from dsmr.data.tokenizer import TICKS_PER_SECOND, Performance, decode, encode
from dsmr.generate.music import SEAM

SUFFIXES = (".mid", ".midi")


@dataclass(frozen=True)
class Excerpt:
    """Notes that begin within a stretch of a piece.

    Attributes:
        name: of the piece.
        seconds: length of the stretch.
        onset: in ticks of 10 ms since its beginning, sorted; then by pitch.
        duration: in ticks.
        pitch: MIDI's.
        velocity: MIDI's.
        start: seconds of the piece before it.
        invalid: events of the file that are no music: notes that never end, or begin while their pitch sounds.
    """

    name: str
    seconds: float
    onset: NDArray[np.int64] = field(repr=False)
    duration: NDArray[np.int64] = field(repr=False)
    pitch: NDArray[np.int64] = field(repr=False)
    velocity: NDArray[np.int64] = field(repr=False)
    start: float = 0.0
    invalid: int = 0


def read_generated(tokenizer: Performance, folder: Path) -> tuple[list[Excerpt], dict[str, str]]:
    """All MIDI files of a folder, each from the marker on where its prompt ends; and those that cannot be read.

    Raises:
        UserError: no such folder, or no MIDI file in it that can be used.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name one with MIDI files, such as dsmr predict writes")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    found, refused = [], {}
    for path in paths:
        try:
            found.append(read_excerpt(tokenizer, path, str(path.relative_to(folder))))
        except (Refused, OSError) as error:
            refused[str(path.relative_to(folder))] = str(error)
    if not found:
        reasons = "".join(f"; {name}: {reason}" for name, reason in list(refused.items())[:3])
        raise UserError(f"{folder} holds no MIDI file that can be used{reasons}")
    return found, refused


def read_excerpt(tokenizer: Performance, path: Path, name: str) -> Excerpt:
    """A MIDI file from its seam on, or all of it.

    Raises:
        Refused: it cannot be used, or has no note after its seam.
        OSError: it cannot be read.
    """
    score, num_unended = read_midi(path.read_bytes())
    seams = [marker.time for marker in score.to("second").markers if marker.text == SEAM]
    first = round(float(max(seams, default=0.0)) * TICKS_PER_SECOND)
    piece = _piece(tokenizer, encode(tokenizer, score).ids, name)
    end = int((piece.onset + piece.duration).max())
    part = stretch(piece, first, max(end - first, 1))
    if not len(part.onset):
        raise Refused("has no note after its prompt")
    return Excerpt(
        name,
        part.seconds,
        part.onset,
        part.duration,
        part.pitch,
        part.velocity,
        part.start,
        num_unended + overlaps(score),
    )


def overlaps(score: "object") -> int:
    """Notes of a score that begin while their own pitch sounds in their track."""
    count = 0
    for track in score.tracks:  # type: ignore[attr-defined]
        notes = track.notes.numpy()
        order = np.lexsort([notes["time"], notes["pitch"]])
        time, pitch = notes["time"][order].astype(np.int64), notes["pitch"][order]
        end = time + notes["duration"][order]
        count += int(((pitch[1:] == pitch[:-1]) & (time[1:] < end[:-1])).sum())
    return count


def read_reference(
    tokenizer: Performance, store: TokenStore, split: Split, start: float, seconds: float
) -> list[Excerpt]:
    """The same stretch of every piece of a split that is long enough to have some of it.

    Args:
        tokenizer: of the store.
        store: with `performance` tokens.
        split: whose pieces.
        start: of the stretch, in seconds.
        seconds: its length.

    Raises:
        UserError: no piece is long enough.
    """
    first, length = round(start * TICKS_PER_SECOND), round(seconds * TICKS_PER_SECOND)
    found = []
    for number in store.of_split(split):
        piece = store.pieces[number]
        ids = store.tokens[piece.start : piece.start + piece.length]
        part = stretch(_piece(tokenizer, ids, piece.name), first, length)
        if len(part.onset) > 1:
            found.append(part)
    if len(found) < 2:
        raise UserError(f"fewer than two {split} pieces of {store.description} have music at {start:.0f} s")
    return found


def stretch(piece: Excerpt, first: int, length: int) -> Excerpt:
    """The notes that begin within ticks [first, first + length)."""
    here = (piece.onset >= first) & (piece.onset < first + length)
    return Excerpt(
        piece.name,
        length / TICKS_PER_SECOND,
        piece.onset[here] - first,
        piece.duration[here],
        piece.pitch[here],
        piece.velocity[here],
        first / TICKS_PER_SECOND,
    )


def _piece(tokenizer: Performance, ids: NDArray[np.uint16], name: str) -> Excerpt:
    notes = {key: value.astype(np.int64) for key, value in decode(tokenizer, ids).tracks[0].notes.numpy().items()}
    order = np.lexsort([notes["pitch"], notes["time"]])
    parts = (notes[key][order] for key in ("time", "duration", "pitch", "velocity"))
    return Excerpt(name, 0.0, *parts)
