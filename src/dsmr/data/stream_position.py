"""The position in the training stream, which checkpoints save, and the sampler that reads from it."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DistributedSampler, SequentialSampler

from dsmr.data.lane_dataset import LaneDataset


class StreamPosition:
    """Epoch and next step of the training stream.

    It counts batches that training has consumed, not those that loader workers have read ahead. The epochs are the
    stream's own: Lightning's counter differs after a resume.
    """

    def __init__(self) -> None:
        self.epoch = self.next_step = 0
        self._num_steps: dict[int, int] = {}  # of the epochs that have started

    def forget_lengths(self) -> None:
        """Forget how many steps an epoch has."""
        self._num_steps.clear()

    def seek(self, epoch: int, step: int = 0) -> None:
        """Set the position; the next iteration starts there."""
        self.epoch, self.next_step = epoch, step

    def advance(self, step: int, *, repeat_epoch: bool) -> None:
        """Mark a batch as consumed; after the last one the next epoch starts, or the same one again."""
        self.next_step = step + 1
        if self.next_step == self._num_steps.get(self.epoch):
            self.seek(self.epoch if repeat_epoch else self.epoch + 1)

    def indices(
        self, dataset: LaneDataset, num_batches: int, *, limit: int | float, repeat_epoch: bool, stop_at_epoch: bool
    ) -> Iterator[tuple[int, int]]:
        """Yield (epoch, step) of `num_batches` batches from the position on, without changing it.

        Args:
            dataset: knows the number of steps of every epoch.
            num_batches: batches of one Lightning epoch.
            limit: number of batches, or share, of an epoch of the stream that is used.
            repeat_epoch: continue with the same epoch instead of the next one.
            stop_at_epoch: stop at the end of the stream's epoch, for a loop of your own. A trainer, whose epochs all
                have the same number of batches, continues into the next one.
        """
        epoch, step = self.epoch, self.next_step
        for _ in range(num_batches):
            if epoch not in self._num_steps:
                whole = dataset.plan(epoch).num_steps
                self._num_steps[epoch] = int(whole * limit) if isinstance(limit, float) else min(whole, limit)
            yield epoch, step
            step += 1
            if step >= self._num_steps[epoch]:
                if stop_at_epoch:
                    return
                epoch, step = epoch if repeat_epoch else epoch + 1, 0


StreamIndices = Callable[[LaneDataset, int], Iterator[tuple[int, int]]]
"""Yields (epoch, step) of a number of batches from the current position of the training stream."""


class StreamSampler(SequentialSampler, DistributedSampler[Any]):
    """Samples the training stream from its current position; every iteration has as many batches as epoch 0.

    To Lightning it is sequential and already distributed, so that neither `overfit_batches` nor
    `use_distributed_sampler` replaces it.

    Args:
        dataset: the segments.
        stream: indices of the training stream; None reads all of epoch 0, for validation and test.
    """

    def __init__(self, dataset: LaneDataset, stream: StreamIndices | None) -> None:
        self.lanes, self.stream = dataset, stream

    def __iter__(self) -> Iterator[Any]:
        if self.stream is not None:
            return self.stream(self.lanes, len(self))
        return iter([(0, step) for step in range(len(self))])

    def __len__(self) -> int:
        return len(self.lanes)
