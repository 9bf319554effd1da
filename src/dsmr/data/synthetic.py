"""Generated pieces with a known long-range dependency: the default data, and a test of memory.

    BOS  mark note soft note  (4 times: the header)   soft notes ...   silence  answer note  soft notes ...  EOS
         |                                                             of 1 s   |
         one of K = 16 loudnesses                                               the same loudness again

A piece starts with a header: four notes of one loudness, the mark, drawn uniformly from K = 16, each followed by a
soft note. Soft notes follow. From time to time there is a silence of a second, and the note after it has the mark's
loudness: the silence asks, the velocity token answers, and only a model that remembers the mark can predict it.

A model reads MASK in place of every answer, so that it cannot copy an earlier answer. The store's marks give, for
every answer, its distance in tokens to the header's last mark. All of it is valid music in the `performance`
encoding. The header has 32 tokens, so a model without memory is at chance if segments are no longer than the shortest
distance.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsmr import UserError
from dsmr.data.performance import TICKS_PER_SECOND, Performance
from dsmr.data.preparation import store_key
from dsmr.data.sources import SPLITS, Entry
from dsmr.data.store import TokenStore
from dsmr.data.store_writer import StoreWriter, open_or_build
from dsmr.data.tokenizer import Encoded, TokenizerSpec, build_tokenizer
from dsmr.data.vocabulary import BOS, EOS

NUM_MARKS = 16  # K, the perplexity of guessing
NUM_HEADER = 4  # with only one, attention finds the mark too rarely to learn within minutes
LONG_SILENCE = 100  # ticks of 10 ms
MIN_DISTANCE = 24


@dataclass(frozen=True)
class RecallTask:
    """Settings of the generated pieces.

    Attributes:
        distances: Tokens from the header's last mark to each answer of a piece.
        num_train: Number of training pieces.
        num_validation: Number of validation pieces, and of test pieces.
        seed: Random seed of the pieces; each split has a random stream of its own.
    """

    distances: tuple[int, ...] = (*range(64, 449, 24), 704, 960)
    num_train: int = 2048
    num_validation: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.distances or np.diff([0, *sorted(self.distances)]).min() < MIN_DISTANCE:
            raise UserError(f"data.recall.distances must start at {MIN_DISTANCE} tokens or more and be that far apart")
        if self.num_train < 1 or self.num_validation < 1:
            raise UserError("data.recall needs at least one training and one validation piece")
        if self.seed < 0:
            raise UserError(f"data.recall.seed is {self.seed}; it must be at least 0")


def prepare_recall(task: RecallTask, cache: Path) -> TokenStore:
    """Open the token store of generated pieces, which are generated if the cache does not have them yet."""
    spec = TokenizerSpec()
    tokenizer = build_tokenizer(spec)
    key = "recall-" + store_key(spec, [(str(asdict(task)),)]).rpartition("-")[2]

    def build() -> TokenStore:
        with StoreWriter(cache / key, "generated recall pieces", spec, marks=True) as writer:
            for index, split in enumerate(SPLITS):
                for number in range(task.num_train if split == "train" else task.num_validation):
                    rng = np.random.default_rng([task.seed, index, number])
                    encoded, marks = _PieceWriter(rng, tokenizer).piece(task.distances)
                    writer.add(Entry(f"{split}/{number:05d}", split), encoded, marks)
            return writer.finish()

    return open_or_build(cache / key, build)


class _PieceWriter:
    """Writes one piece, and counts what the store records about it."""

    def __init__(self, rng: np.random.Generator, tokenizer: Performance) -> None:
        self.rng, self.vocab = rng, tokenizer.vocab
        self.loudness = [self.vocab[f"Velocity_{velocity}"] for velocity in tokenizer.velocities]
        self.shifts = [id_ for name, id_ in self.vocab.items() if name.startswith("TimeShift_")]
        self.ids, self.distances = [BOS], [0]
        self.ticks = 0
        self.pitches: list[int] = []

    def piece(self, distances: tuple[int, ...]) -> tuple[Encoded, NDArray[np.uint16]]:
        """Return a piece and its marks."""
        soft, loud = self.loudness[0], self.loudness[-NUM_MARKS:][int(self.rng.integers(NUM_MARKS))]
        for loudness in (loud, soft) * NUM_HEADER:
            self.write(loudness)
            self.note()
        last_mark = len(self.ids) - 8
        for number, distance in enumerate(sorted(distances)):
            if number:
                self.silence(int(self.rng.integers(1, 20)))
                self.write(soft)
            self.soft_notes(last_mark + distance - 1 - len(self.ids))
            self.silence(LONG_SILENCE)
            self.write(loud, distance)
            self.note()
        self.write(EOS)
        encoded = Encoded(
            ids=np.asarray(self.ids, dtype=np.uint16),
            num_notes=len(self.pitches),
            seconds=self.ticks / TICKS_PER_SECOND,
            pitch_min=min(self.pitches),
            pitch_max=max(self.pitches),
        )
        return encoded, np.asarray(self.distances, dtype=np.uint16)

    def write(self, id_: int, distance: int = 0) -> None:
        self.ids.append(id_)
        self.distances.append(distance)

    def silence(self, ticks: int) -> None:
        self.write(self.shifts[ticks - 1])
        self.ticks += ticks

    def note(self) -> None:
        """Write three tokens: note-on, time shift, note-off."""
        pitch = int(self.rng.integers(48, 84))
        self.write(self.vocab[f"NoteOn_{pitch}"])
        self.silence(int(self.rng.integers(5, 40)))
        self.write(self.vocab[f"NoteOff_{pitch}"])
        self.pitches.append(pitch)

    def soft_notes(self, num_tokens: int) -> None:
        """Write exactly `num_tokens` tokens: notes of three, and silences of one between some of them."""
        num_notes = int(self.rng.integers(-(-(num_tokens + 1) // 4), num_tokens // 3 + 1))
        num_silences = num_tokens - 3 * num_notes
        silent = set(self.rng.choice(num_notes - 1, num_silences, replace=False)) if num_silences else set()
        for number in range(num_notes):
            self.note()
            if number in silent:
                self.silence(int(self.rng.integers(1, 20)))
