"""The LightningDataModule: pieces as lanes of segments, with a stream position that checkpoints save."""

import os
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from miditok import MusicTokenizer
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from dsmr import UserError
from dsmr.batch import Segment
from dsmr.data.folder import GIVE_DATA, Source, find_source
from dsmr.data.lane_dataset import LaneDataset, StreamPosition, StreamSampler
from dsmr.data.lanes import LaneReader
from dsmr.data.maestro import GET_MAESTRO, MAESTRO_NAME, MAESTRO_VARIABLE
from dsmr.data.preparation import Progress, prepare_midi
from dsmr.data.sources import Split
from dsmr.data.store import TokenStore, cache_folder, is_store, open_store
from dsmr.data.synthetic import RecallTask, prepare_recall
from dsmr.data.tokenizer import TokenizerSpec, build_tokenizer
from dsmr.data.transposition import transposition_tables
from dsmr.data.vocabulary import FAMILIES, note_on_mask, token_families
from dsmr.data.windows import Windows, plan_epoch


class MusicData(LightningDataModule):
    """Pieces of music as lanes of segments.

    Args:
        path: Folder or zip of MIDI files, MAESTRO, or a token store (default: $DSMR_MAESTRO, or the downloaded
            MAESTRO).
        recall: Generate pieces for a memory task instead of reading MIDI files.
        windows: Isolated windows of segment_length tokens instead of streams with memory.
        tokenizer: Tokenizer of the MIDI files.
        segment_length: Tokens per lane and batch (T).
        num_lanes: Lanes per process (B), the batch size.
        transpose: Transpose each training piece by up to this many semitones, at random in every epoch.
        validation_stride: Validate on every n-th piece of the split.
        seed: Random seed of the training data (default: --seed_everything, or 0).
        cache_dir: Folder of token stores (default: $DSMR_CACHE, or ~/.cache/dsmr).
        max_refused_share: Fail if a larger share of the files is unreadable.
        num_workers: Loader processes (0: read in the training process).

    Raises:
        UserError: there is no data, or it cannot be used; the message says what to do.
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
        check_at_least(1, segment_length=segment_length, num_lanes=num_lanes, validation_stride=validation_stride)
        check_at_least(0, transpose=transpose, num_workers=num_workers, seed=seed or 0)
        if not 0 <= max_refused_share <= 1:
            raise UserError(f"data.max_refused_share is {max_refused_share}; it must be from 0 to 1")
        if path is not None and recall is not None:
            raise UserError(f"data.recall generates pieces and would ignore data.path {path}; set data.recall to null")
        if recall is not None and tokenizer != TokenizerSpec():
            raise UserError("data.recall generates performance tokens; leave out data.tokenizer, or use MIDI files")
        if windows is not None and windows.protocol == "strided" and windows.stride > segment_length:
            raise UserError(f"data.windows.stride {windows.stride} exceeds data.segment_length {segment_length}")
        self.path, self.recall, self.windows, self.tokenizer_spec = path, recall, windows, tokenizer
        self.segment_length, self.num_lanes = segment_length, num_lanes
        self.transpose, self.validation_stride = transpose, validation_stride
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.cache_dir, self.max_refused_share = cache_dir, max_refused_share
        self.num_workers = num_workers
        self.vocab_size = len(self.tokenizer.vocab)
        self.progress: Progress | None = None
        self.position = StreamPosition()

    @property
    def tokenizer(self) -> MusicTokenizer:
        """MidiTok's tokenizer."""
        return build_tokenizer(self.tokenizer_spec)

    @property
    def note_on_mask(self) -> NDArray[np.bool_]:
        """Mask of the ids that start a note, (V,)."""
        return note_on_mask(self.tokenizer)

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the token families."""
        return tuple(FAMILIES)

    @property
    def token_families(self) -> NDArray[np.int64]:
        """Family of every id as an index into `families`, (V,)."""
        return token_families(self.tokenizer)

    @property
    def recall_distances(self) -> tuple[int, ...]:
        """Distances in tokens from mark to answer in generated pieces; empty for music."""
        return tuple(sorted(self.recall.distances)) if self.recall else ()

    @property
    def tokens_per_second(self) -> float:
        """Mean number of tokens per second of music over all pieces."""
        return self.store.tokens_per_second

    @cached_property
    def store(self) -> TokenStore:
        """The token store, built if it does not exist yet."""
        cache, spec = cache_folder(self.cache_dir), self.tokenizer_spec
        if self.recall:
            return prepare_recall(self.recall, cache)
        if is_store(self._folder()):
            return open_store(self._folder(), spec)
        refused = self.max_refused_share
        return prepare_midi(self.source(), spec, cache, max_refused_share=refused, progress=self.progress)

    def source(self) -> Source:
        """Open the MIDI files; raises `UserError` if no path is given or nothing there can be used."""
        return find_source(self._folder(), self._path_option)

    @property
    def _path_option(self) -> str:
        return "data.path" if self.path else MAESTRO_VARIABLE

    def _folder(self) -> Path:
        """Return the path of the MIDI files or of a token store."""
        given = self.path or os.environ.get(MAESTRO_VARIABLE)
        if not given:
            downloaded = cache_folder(self.cache_dir) / MAESTRO_NAME
            if downloaded.is_file():
                return downloaded
            raise UserError(f"no data: give a folder or a zip of MIDI files with --data.path, or {GET_MAESTRO}")
        folder = Path(given).expanduser()
        if not folder.exists():
            raise UserError(f"{self._path_option}: {given} does not exist; {GIVE_DATA}")
        return folder

    def prepare_data(self) -> None:
        """Build the token store; Lightning calls this in one process."""
        assert self.store is not None

    def pieces(self, split: Split) -> list[int]:
        """Return the numbers of the split's pieces that are used; raises `UserError` if there are none."""
        numbers = self.store.of_split(split)[:: self.validation_stride if split == "validation" else 1]
        if not numbers:
            raise UserError(
                f"{self.store.description}: no piece of the {split} split; add files, or give other --data.path"
            )
        return numbers

    def check_training(self, *, with_validation: bool) -> None:
        """Raise `UserError` if there are no training pieces, or no validation pieces although they are needed."""
        self.pieces("train")
        if with_validation and not self.store.of_split("validation"):
            raise UserError(
                f"{self.store.description}: no piece of the validation split; add files, or train without validation "
                "(--trainer.limit_val_batches 0)"
            )

    def train_dataloader(self) -> DataLoader[Segment]:
        """Training segments; an interrupted epoch resumes at its next batch."""
        self.position.num_steps.clear()  # another trainer may limit epochs differently
        return self._loader("train", seed=self.seed, semitones=self.transpose)

    def val_dataloader(self) -> DataLoader[Segment]:
        """Validation segments, in a fixed order and never transposed."""
        return self._loader("validation", seed=0, semitones=0)

    def test_dataloader(self) -> DataLoader[Segment]:
        """Test segments, in a fixed order and never transposed."""
        return self._loader("test", seed=0, semitones=0)

    def _loader(self, split: Split, *, seed: int, semitones: int) -> DataLoader[Segment]:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        reader = LaneReader(
            self.store,
            self.segment_length,
            transpositions=transposition_tables(self.tokenizer, semitones) if semitones else None,
            pitch_range=self.tokenizer.config.pitch_range,
            seed=seed,
        )
        numbers = self.pieces(split)
        lengths = [self.store.pieces[number].length for number in numbers]
        pieces = (numbers, lengths, self.segment_length, self.num_lanes * world_size)
        plan = partial(plan_epoch, *pieces, windows=self.windows, split=split, seed=seed)
        dataset = LaneDataset(reader, plan, slice(rank * self.num_lanes, (rank + 1) * self.num_lanes))
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=StreamSampler(dataset, self._stream if split == "train" else None),
            num_workers=self.num_workers,
            generator=torch.Generator(),  # otherwise the loader draws its seed from the global RNG, as dropout does
            pin_memory=bool(self.trainer and self.trainer.strategy.root_device.type == "cuda"),
        )

    def seek(self, epoch: int, step: int = 0) -> None:
        """Set the position in the training stream; the next iteration starts there."""
        self.position.seek(epoch, step)

    def advance(self, step: int) -> None:
        """Mark a training batch as consumed; after the last one the next epoch starts."""
        self.position.advance(step, repeat_epoch=bool(self._overfit_batches))

    def _stream(self, dataset: LaneDataset, num_batches: int) -> Iterator[tuple[int, int]]:
        """Yield (epoch, step) of the next batches; `trainer.overfit_batches` repeats the first ones of an epoch."""
        return self.position.indices(
            dataset, num_batches, overfit_batches=self._overfit_batches, stop_at_epoch=self.trainer is None
        )

    @property
    def _overfit_batches(self) -> int | float:
        """A number of batches, a share of an epoch, or 0."""
        limit: int | float = self.trainer.overfit_batches if self.trainer else 0  # type: ignore[attr-defined]
        return limit

    def state_dict(self) -> dict[str, Any]:
        """Position in the training stream, and the settings that define the stream."""
        return {
            "epoch": self.position.epoch,
            "next_step": self.position.next_step,
            "seed": self.seed,
            "segment_length": self.segment_length,
            "num_lanes": self.num_lanes,
            "transpose": self.transpose,
            "windows": self.windows is not None,
            "world_size": self.trainer.world_size if self.trainer else 1,
            "store": self.store.path.name,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the stream position when training resumes; raises `UserError` if the stream is another one."""
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        mine = self.state_dict()
        for name in mine.keys() - {"epoch", "next_step"}:
            saved = state_dict.get(name, mine[name])
            if saved != mine[name]:
                label = "trainer.devices x trainer.num_nodes" if name == "world_size" else f"data.{name}"
                raise UserError(
                    f"the run to resume was trained with {label} = {saved}, now it is {mine[name]}; "
                    "use the run's own value, or start a new run"
                )
        self.seek(state_dict["epoch"], state_dict["next_step"])


def check_at_least(minimum: int, **settings: int) -> None:
    """Raise `UserError` for the first setting of the data that is below a minimum."""
    for name, value in settings.items():
        if value < minimum:
            raise UserError(f"data.{name} is {value}; it must be at least {minimum}")
