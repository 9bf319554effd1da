"""Generated pieces with a known long-range dependency: the embedded default, and the test of memory.

A piece begins with a header: four notes of one loudness, its mark, one of K = 16 and drawn uniformly, each
followed by a soft note. Then come soft notes without end. Now and then there is a long silence, and the note
after it is as loud as the header was. The silence asks, the loudness answers, and an answer can be known only by
remembering the mark.

A model reads MASK in the place of every answer, so that nothing but memory of the mark helps: an answer is
predicted, never read. The store's marks give, for every answer, its distance in tokens from the header's last
mark. All is valid music in the `performance` encoding. The header takes 32 tokens, so a model without memory is
at chance wherever the segments are no longer than the shortest distance.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsmr.data.errors import DataError
from dsmr.data.sources import Entry, Split
from dsmr.data.store import StoreWriter, TokenStore, build_once, store_key
from dsmr.data.tokenizer import (
    BOS,
    EOS,
    TICKS_PER_SECOND,
    Encoded,
    Performance,
    TokenizerSpec,
    build_tokenizer,
)

NUM_MARKS = 16
"""K, the perplexity of chance."""
NUM_HEADER = 4
"""Marks in a header: with a single one, attention finds it too rarely to learn from within minutes."""
LONG_SILENCE = 100
"""Ticks of 10 ms."""
MIN_DISTANCE = 24
SPLIT_NUMBERS: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}


@dataclass(frozen=True)
class RecallTask:
    """What is generated.

    Attributes:
        distances: tokens from the header's last mark to an answer; each is asked once in every piece.
        num_train: training pieces.
        num_validation: validation pieces, and as many test pieces.
        seed: of the generator; the splits draw from separate streams of it.
    """

    distances: tuple[int, ...] = (*range(64, 449, 24), 704, 960)
    num_train: int = 2048
    num_validation: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.distances or np.diff([0, *sorted(self.distances)]).min() < MIN_DISTANCE:
            raise DataError(f"recall distances must begin at {MIN_DISTANCE} tokens and be as far apart")
        if self.num_train < 1 or self.num_validation < 1:
            raise DataError("recall needs at least one training and one validation piece")
        if self.seed < 0:
            raise DataError(f"data.recall.seed is {self.seed}; it must be at least 0")


def prepare_recall(task: RecallTask, cache: Path) -> TokenStore:
    """Token store of generated pieces, with marks."""
    spec = TokenizerSpec()
    tokenizer = build_tokenizer(spec)
    key = "recall-" + store_key(spec, [(str(asdict(task)),)]).rpartition("-")[2]

    def build() -> TokenStore:
        with StoreWriter(cache / key, "generated recall pieces", spec, marks=True) as writer:
            for entry, encoded, marks in generate(task, tokenizer):
                writer.add(entry, encoded, marks)
            return writer.finish()

    return build_once(cache / key, build)


def generate(task: RecallTask, tokenizer: Performance) -> Iterator[tuple[Entry, Encoded, NDArray[np.uint16]]]:
    """All pieces of a task with the distance of every answer, 0 elsewhere."""
    counts: dict[Split, int] = {
        "train": task.num_train,
        "validation": task.num_validation,
        "test": task.num_validation,
    }
    for split, count in counts.items():
        for number in range(count):
            rng = np.random.default_rng([task.seed, SPLIT_NUMBERS[split], number])
            encoded, marks = _piece(rng, task.distances, tokenizer)
            yield Entry(f"{split}/{number:05d}", split), encoded, marks


def _piece(
    rng: np.random.Generator, distances: tuple[int, ...], tokenizer: Performance
) -> tuple[Encoded, NDArray[np.uint16]]:
    writer = _PieceWriter(rng, tokenizer)
    mark = int(rng.integers(NUM_MARKS))
    for _ in range(NUM_HEADER):
        writer.write(writer.loudness[-NUM_MARKS:][mark])
        writer.note()
        writer.write(writer.loudness[0])
        writer.note()
    last_mark = len(writer.ids) - 8
    for number, distance in enumerate(sorted(distances)):
        if number:
            writer.silence(int(rng.integers(1, 20)))
            writer.write(writer.loudness[0])
        writer.soft_notes(last_mark + distance - 1 - len(writer.ids))
        writer.silence(LONG_SILENCE)
        writer.write(writer.loudness[-NUM_MARKS:][mark], distance)
        writer.note()
    writer.write(EOS)
    return writer.finish()


class _PieceWriter:
    """Appends events and keeps count of what the store wants to know."""

    def __init__(self, rng: np.random.Generator, tokenizer: Performance) -> None:
        self.rng, self.vocab = rng, tokenizer.vocab
        self.loudness = [self.vocab[f"Velocity_{velocity}"] for velocity in tokenizer.velocities]
        self.shifts = [id_ for name, id_ in self.vocab.items() if name.startswith("TimeShift_")]
        self.ids, self.distances = [BOS], [0]
        self.ticks = 0
        self.pitches: list[int] = []

    def write(self, id_: int, distance: int = 0) -> None:
        self.ids.append(id_)
        self.distances.append(distance)

    def silence(self, ticks: int) -> None:
        self.write(self.shifts[ticks - 1])
        self.ticks += ticks

    def note(self) -> None:
        """Three tokens: on, time shift, off."""
        pitch = int(self.rng.integers(48, 84))
        self.write(self.vocab[f"NoteOn_{pitch}"])
        self.silence(int(self.rng.integers(5, 40)))
        self.write(self.vocab[f"NoteOff_{pitch}"])
        self.pitches.append(pitch)

    def soft_notes(self, num_tokens: int) -> None:
        """Exactly so many tokens: notes, and short silences between some of them."""
        num_notes = int(self.rng.integers(-(-(num_tokens + 1) // 4), num_tokens // 3 + 1))
        num_silences = num_tokens - 3 * num_notes
        silent = set(self.rng.choice(num_notes - 1, num_silences, replace=False)) if num_silences else set()
        for number in range(num_notes):
            self.note()
            if number in silent:
                self.silence(int(self.rng.integers(1, 20)))

    def finish(self) -> tuple[Encoded, NDArray[np.uint16]]:
        encoded = Encoded(
            ids=np.asarray(self.ids, dtype=np.uint16),
            num_notes=len(self.pitches),
            seconds=self.ticks / TICKS_PER_SECOND,
            pitch_min=min(self.pitches),
            pitch_max=max(self.pitches),
        )
        return encoded, np.asarray(self.distances, dtype=np.uint16)
