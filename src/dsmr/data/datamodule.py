"""The LightningDataModule: pieces as lanes, with a place in the stream that survives a checkpoint."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import numpy as np
import torch
from lightning import LightningDataModule
from miditok import MusicTokenizer
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from dsmr.data.download import NAME
from dsmr.data.errors import DataError
from dsmr.data.folder import SUFFIXES, MidiFolder, MidiZip
from dsmr.data.lanes import LaneReader, Plan, Segment, plan_epoch
from dsmr.data.maestro import ADVICE, ENVIRONMENT_VARIABLE, csv_names, find_csv, find_maestro, only_child
from dsmr.data.sources import Source, Split
from dsmr.data.store import Progress, TokenStore, cache_folder, is_store, open_store, prepare_midi
from dsmr.data.synthetic import RecallTask, prepare_recall
from dsmr.data.tokenizer import (
    FAMILIES,
    TokenizerSpec,
    build_tokenizer,
    note_on_mask,
    token_families,
    transpositions,
)
from dsmr.data.windows import Windows, plan_random, plan_strided, plan_training

WANTED = "give a folder or a zip of MIDI files, MAESTRO's zip or folder, or a token store"


class PieceTokens(NamedTuple):
    """A piece as the token store has it.

    Attributes:
        name: in its source.
        ids: BOS, events, EOS; int64.
    """

    name: str
    ids: Tensor


class MusicData(LightningDataModule):
    """Pieces of music as lanes of segments.

    Args:
        path: a folder or a zip of MIDI files, MAESTRO (zip or folder), or a token store that was prepared elsewhere;
            None means `$DSMR_MAESTRO`, or what `dsmr prepare --download` has fetched.
        recall: generated pieces instead of MIDI files.
        windows: isolated windows of `segment_length` tokens instead of streams with a memory.
        tokenizer: how MIDI becomes tokens.
        segment_length: T, tokens per lane and batch.
        num_lanes: B, lanes of one process.
        transpose: training pieces are transposed by up to so many semitones, anew in each epoch.
        validation_stride: validate on every n-th piece of the split in the source's order; 1 is the whole split.
        seed: of dealing, order and transposition in training; None means Lightning's global seed, or 0.
        cache_dir: where token stores lie; None means `$DSMR_CACHE` or `~/.cache/dsmr`.
        max_refused_share: share of unreadable files above which nothing is prepared.
        num_workers: loader processes; 0 reads in the training process, which costs microseconds a batch.

    Raises:
        DataError: there is no data, or it cannot be used; the message says what to do.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        recall: RecallTask | None = None,
        windows: Windows | None = None,
        tokenizer: TokenizerSpec = TokenizerSpec(),  # noqa: B008 (frozen)
        segment_length: int = 512,
        num_lanes: int = 8,
        transpose: int = 3,
        validation_stride: int = 1,
        seed: int | None = None,
        cache_dir: str | None = None,
        max_refused_share: float = 0.1,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("segment_length", segment_length, 1),
            ("num_lanes", num_lanes, 1),
            ("transpose", transpose, 0),
            ("validation_stride", validation_stride, 1),
            ("num_workers", num_workers, 0),
            ("seed", 0 if seed is None else seed, 0),
        ):
            if value < least:
                raise DataError(f"data.{name} is {value}; it must be at least {least}")
        if not 0 <= max_refused_share <= 1:
            raise DataError(f"data.max_refused_share is {max_refused_share}; it must be from 0 to 1")
        if path is not None and recall is not None:
            raise DataError(
                f"data.recall generates pieces, so that data.path {path} is not read; set data.recall to null"
            )
        if windows is not None and windows.protocol == "strided" and windows.stride > segment_length:
            raise DataError(f"data.windows.stride {windows.stride} exceeds data.segment_length {segment_length}")
        self.path, self.recall, self.windows, self.tokenizer_spec = path, recall, windows, tokenizer
        self.segment_length, self.num_lanes = segment_length, num_lanes
        self.transpose, self.validation_stride = transpose, validation_stride
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.cache_dir, self.max_refused_share = cache_dir, max_refused_share
        self.num_workers = num_workers
        self.vocab_size = len(self.tokenizer.vocab)
        self.progress: Progress | None = None
        self._epoch = self._next_step = 0
        self._num_steps: dict[int, int] = {}  # of the epochs that were begun
        self._store: TokenStore | None = None

    @property
    def tokenizer(self) -> MusicTokenizer:
        """MidiTok's tokenizer."""
        return build_tokenizer(self.tokenizer_spec)

    @property
    def note_on_mask(self) -> NDArray[np.bool_]:
        """Which ids begin a note, (V,)."""
        return note_on_mask(self.tokenizer)

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families of tokens."""
        return tuple(FAMILIES)

    @property
    def token_families(self) -> NDArray[np.int64]:
        """Family of each id, (V,), as its place in `families`."""
        return token_families(self.tokenizer)

    @property
    def recall_distances(self) -> tuple[int, ...]:
        """Distances in tokens at which generated pieces ask; none for music."""
        return tuple(sorted(self.recall.distances)) if self.recall else ()

    @property
    def tokens_per_second(self) -> float:
        """Tokens in one second of music, the mean over all pieces."""
        return self.store.tokens_per_second

    @property
    def store(self) -> TokenStore:
        """The token store, built where it is not there yet."""
        if self._store is None:
            cache = cache_folder(self.cache_dir)
            if self.recall:
                self._store = prepare_recall(self.recall, cache)
            elif is_store(self._folder()):
                self._store = open_store(self._folder(), self.tokenizer_spec)
            else:
                self._store = prepare_midi(
                    self.source(),
                    self.tokenizer_spec,
                    cache,
                    max_refused_share=self.max_refused_share,
                    progress=self.progress,
                )
        return self._store

    def source(self) -> Source:
        """Where the MIDI files come from.

        Raises:
            DataError: no path is given, or nothing there can be used.
        """
        return find_source(self._folder(), self._option)

    @property
    def _option(self) -> str:
        """Where the path was given."""
        return "data.path" if self.path else ENVIRONMENT_VARIABLE

    def _folder(self) -> Path:
        """What was given: MIDI files, MAESTRO's zip, or a token store."""
        given = self.path or os.environ.get(ENVIRONMENT_VARIABLE)
        downloaded = cache_folder(self.cache_dir) / NAME
        if not given and downloaded.is_file():
            return downloaded
        if not given:
            raise DataError(f"no data: give a folder or a zip of MIDI files with --data.path, or {ADVICE}")
        folder = Path(given).expanduser()
        if not folder.exists():
            raise DataError(f"{self._option}: {given} does not exist; {WANTED}")
        return folder

    def prepare_data(self) -> None:
        """Build the token store once, on one process."""
        assert self.store is not None

    def pieces(self, split: Split) -> list[int]:
        """Numbers of the split's pieces that are used.

        Raises:
            DataError: there are none.
        """
        numbers = self.store.of_split(split)[:: self.validation_stride if split == "validation" else 1]
        if not numbers:
            raise DataError(
                f"{self.store.description}: no piece of the {split} split; add files, or give other --data.path"
            )
        return numbers

    def check_training(self, *, with_validation: bool) -> None:
        """Refuse to train without training pieces, or to validate without validation pieces.

        Raises:
            DataError: a split has none.
        """
        self.pieces("train")
        if with_validation and not self.store.of_split("validation"):
            raise DataError(
                f"{self.store.description}: no piece of the validation split; add files, or train without validation "
                "(--trainer.limit_val_batches 0)"
            )

    def train_dataloader(self) -> DataLoader[Segment]:
        """Training segments; an epoch that was interrupted goes on at its next batch."""
        self._num_steps.clear()  # another trainer may cut epochs elsewhere
        return self._loader("train", seed=self.seed, semitones=self.transpose)

    def val_dataloader(self) -> DataLoader[Segment]:
        """Validation segments, always dealt alike and never transposed."""
        return self._loader("validation", seed=0, semitones=0)

    def test_dataloader(self) -> DataLoader[Segment]:
        """Test segments, always dealt alike and never transposed."""
        return self._loader("test", seed=0, semitones=0)

    def predict_dataloader(self) -> DataLoader[PieceTokens]:
        """Whole validation pieces, one after another; each process has its own."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        pieces = PieceDataset(self.store, self.pieces("validation")[rank::world_size])
        return DataLoader(pieces, batch_size=None, generator=torch.Generator())

    def _loader(self, split: Split, *, seed: int, semitones: int) -> DataLoader[Segment]:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        tables = transpositions(self.tokenizer, semitones) if semitones else None
        reader = LaneReader(
            self.store,
            self.segment_length,
            transpositions=tables,
            pitch_range=self.tokenizer.config.pitch_range,
            seed=seed,
        )
        numbers = self.pieces(split)
        planner = Planner(
            split=split,
            numbers=numbers,
            lengths=[self.store.pieces[number].length for number in numbers],
            segment_length=self.segment_length,
            num_lanes=self.num_lanes * world_size,
            seed=seed,
            windows=self.windows,
        )
        lanes = slice(rank * self.num_lanes, (rank + 1) * self.num_lanes)
        dataset = LaneDataset(reader, planner, lanes)
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=StreamSampler(dataset, self if split == "train" else None),
            num_workers=self.num_workers,
            generator=torch.Generator(),  # its own, so that no loader draws from what dropout draws from
            pin_memory=bool(self.trainer and self.trainer.strategy.root_device.type == "cuda"),
        )

    def seek(self, epoch: int, step: int = 0) -> None:
        """Go to a place in the training stream; the next iteration begins there."""
        self._epoch, self._next_step = epoch, step

    def advance(self, step: int) -> None:
        """Mark a training batch as consumed; after the last one the next epoch begins."""
        self._next_step = step + 1
        if self._next_step == self._num_steps.get(self._epoch):
            self.seek(self._epoch if self._num_overfitted else self._epoch + 1)

    def stream(self, dataset: "LaneDataset", num_batches: int) -> Iterator[tuple[int, int]]:
        """(epoch, step) of that many batches from the stream's place on.

        Under a trainer, whose epochs all have the same number of batches, it runs on into the stream's next epoch; in
        a loop of one's own it ends with the epoch. Under `trainer.overfit_batches` these are the first batches of one
        epoch, again and again.
        """
        epoch, step = self._epoch, self._next_step
        for _ in range(num_batches):
            if epoch not in self._num_steps:
                whole, limit = dataset.plan(epoch).num_steps, self._num_overfitted or 1.0
                self._num_steps[epoch] = int(whole * limit) if isinstance(limit, float) else min(whole, limit)
            yield epoch, step
            step += 1
            if step >= self._num_steps[epoch]:
                if self.trainer is None:
                    return
                epoch, step = epoch if self._num_overfitted else epoch + 1, 0

    @property
    def _num_overfitted(self) -> int | float:
        """Batches, or share of an epoch, that `trainer.overfit_batches` names; 0 for none."""
        limit: int | float = self.trainer.overfit_batches if self.trainer else 0  # type: ignore[attr-defined]
        return limit

    def state_dict(self) -> dict[str, Any]:
        """Place in the training stream, and what it is a place in."""
        return {
            "epoch": self._epoch,
            "next_step": self._next_step,
            "seed": self.seed,
            "segment_length": self.segment_length,
            "num_lanes": self.num_lanes,
            "transpose": self.transpose,
            "windows": self.windows is not None,
            "world_size": self.trainer.world_size if self.trainer else 1,
            "store": self.store.path.name,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at a saved place when training is resumed.

        Raises:
            DataError: it is a place in another stream.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        mine = self.state_dict()
        for name in mine.keys() - {"epoch", "next_step"}:
            saved = state_dict.get(name, mine[name])
            if saved != mine[name]:
                label = "trainer.devices x trainer.num_nodes" if name == "world_size" else f"data.{name}"
                raise DataError(
                    f"the run to resume was trained with {label} = {saved}, now it is {mine[name]}; "
                    "use the run's own value, or begin a new run"
                )
        self.seek(state_dict["epoch"], state_dict["next_step"])


def find_source(path: Path, option: str) -> Source:
    """MIDI files at a path: MAESTRO where its CSV is, else a folder or a zip of MIDI files.

    Args:
        path: which exists.
        option: where it was given, for messages.

    Raises:
        DataError: it is a file, but no zip that can be read.
    """
    if path.is_dir():
        is_maestro = bool(find_csv(path) or find_csv(only_child(path)))
        return find_maestro(path) if is_maestro else MidiFolder(path)
    if path.suffix.lower() in SUFFIXES:
        raise DataError(f"{option}: {path} is a single MIDI file; {WANTED}")
    if not is_zipfile(path):
        is_damaged = path.suffix.lower() == ".zip"
        what = "is not a readable zip: damaged, or not complete" if is_damaged else "is neither a folder nor a zip"
        raise DataError(f"{option}: {path} {what}; {WANTED}")
    files = MidiZip(path)
    return find_maestro(path) if csv_names(files.zip.names) else files


@dataclass(frozen=True)
class Planner:
    """Which plan a split has: streams in lanes, or isolated windows.

    Attributes:
        split: of the pieces.
        numbers: of the pieces in the store.
        lengths: of the pieces in tokens, BOS included.
        segment_length: T.
        num_lanes: of all processes.
        seed: of dealing and cutting.
        windows: None for streams.
    """

    split: Split
    numbers: list[int]
    lengths: list[int]
    segment_length: int
    num_lanes: int
    seed: int
    windows: Windows | None

    def __call__(self, epoch: int) -> Plan:
        """Plan of an epoch."""
        pieces, length, lanes = (self.numbers, self.lengths), self.segment_length, self.num_lanes
        if self.windows is None:
            return plan_epoch(*pieces, segment_length=length, num_lanes=lanes, seed=self.seed, epoch=epoch)
        if self.split == "train":
            return plan_training(*pieces, window=length, num_lanes=lanes, seed=self.seed, epoch=epoch)
        if self.windows.protocol == "random":
            return plan_random(*pieces, window=length, num_lanes=lanes, seed=self.seed)
        return plan_strided(*pieces, window=length, stride=self.windows.stride, num_lanes=lanes)


class LaneDataset(Dataset[Segment]):
    """Batches by (epoch, step); stateless, so that any number of workers give the same stream."""

    def __init__(self, reader: LaneReader, planner: Planner, lanes: slice) -> None:
        self.reader, self.planner, self.lanes = reader, planner, lanes
        self._plan: tuple[int, Plan] | None = None
        self._num_steps: int | None = None

    def plan(self, epoch: int) -> Plan:
        """Plan of an epoch over the lanes of all processes."""
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, self.planner(epoch))
        return self._plan[1]

    def __getitem__(self, index: tuple[int, int]) -> Segment:
        epoch, step = index
        return self.reader.read(self.plan(epoch), step, self.lanes, epoch)

    def __len__(self) -> int:
        """Batches of epoch 0; with windows, other epochs have a few more or less."""
        if self._num_steps is None:
            self._num_steps = self.planner(0).num_steps
        return self._num_steps


class PieceDataset(Dataset[PieceTokens]):
    """Whole pieces of a store."""

    def __init__(self, store: TokenStore, numbers: list[int]) -> None:
        self.store, self.numbers = store, numbers

    def __getitem__(self, index: int) -> PieceTokens:
        piece = self.store.pieces[self.numbers[index]]
        ids = self.store.tokens[piece.start : piece.start + piece.length].astype(np.int64)
        return PieceTokens(piece.name, torch.from_numpy(ids))

    def __len__(self) -> int:
        return len(self.numbers)


class StreamSampler(SequentialSampler, DistributedSampler[Any]):
    """The training stream from its present place on; every iteration has as many batches as epoch 0.

    The stream keeps its own count of epochs, since Lightning's differs after a resumption. Validation and test
    (`stream` None) always read all of epoch 0. To Lightning it is sequential and dealt to the processes already, so
    that neither `overfit_batches` nor `use_distributed_sampler` replaces it.
    """

    def __init__(self, dataset: LaneDataset, stream: MusicData | None) -> None:
        self.lanes, self.stream = dataset, stream

    def __iter__(self) -> Iterator[Any]:
        if self.stream is not None:
            return self.stream.stream(self.lanes, len(self))
        return iter([(0, step) for step in range(len(self))])

    def __len__(self) -> int:
        return len(self.lanes)
