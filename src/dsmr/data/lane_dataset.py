"""PyTorch dataset of segments by (epoch, step), and the position in the training stream, which checkpoints save."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from dsmr.batch import Segment
from dsmr.data.lanes import LaneReader, Plan


class LaneDataset(Dataset[Segment]):
    """Batches by (epoch, step). Stateless, so that the stream does not depend on the number of loader workers.

    `lanes` are those of this process among those of all processes; `plan_epoch` returns the plan of an epoch.
    """

    def __init__(self, reader: LaneReader, plan_epoch: Callable[[int], Plan], lanes: slice) -> None:
        self.reader, self.plan_epoch, self.lanes = reader, plan_epoch, lanes
        self._plan = (0, plan_epoch(0))
        self._num_steps = self._plan[1].num_steps

    def plan(self, epoch: int) -> Plan:
        """Return the plan of an epoch over the lanes of all processes; the last one is cached."""
        if self._plan[0] != epoch:
            self._plan = (epoch, self.plan_epoch(epoch))
        return self._plan[1]

    def __getitem__(self, index: tuple[int, int]) -> Segment:
        epoch, step = index
        return self.reader.read_segment(self.plan(epoch), step, self.lanes, epoch)

    def __len__(self) -> int:
        """Number of batches of epoch 0; with windows, other epochs have a few more or less."""
        return self._num_steps


class StreamPosition:
    """Epoch and next step of the training stream.

    It counts batches that training has consumed, not those that loader workers have read ahead. The epochs are the
    stream's own: Lightning's counter differs after a resume.
    """

    def __init__(self) -> None:
        self.epoch = self.next_step = 0
        self.num_steps: dict[int, int] = {}  # of the epochs that have started

    def seek(self, epoch: int, step: int = 0) -> None:
        """Set the position; the next iteration starts there."""
        self.epoch, self.next_step = epoch, step

    def advance(self, step: int, *, repeat_epoch: bool) -> None:
        """Mark a batch as consumed; after the last one the next epoch starts, or the same one again."""
        self.next_step = step + 1
        if self.next_step == self.num_steps.get(self.epoch):
            self.seek(self.epoch if repeat_epoch else self.epoch + 1)

    def indices(
        self, dataset: LaneDataset, num_batches: int, *, overfit_batches: int | float, stop_at_epoch: bool
    ) -> Iterator[tuple[int, int]]:
        """Yield (epoch, step) of `num_batches` batches from the position on, without changing it.

        Args:
            dataset: knows the number of steps of every epoch.
            num_batches: batches of one Lightning epoch.
            overfit_batches: number of batches, or share, of an epoch of the stream that is repeated; 0 for none.
            stop_at_epoch: stop at the end of the stream's epoch, for a loop of your own. A trainer, whose epochs all
                have the same number of batches, continues into the next one.
        """
        epoch, step, limit = self.epoch, self.next_step, overfit_batches or 1.0
        for _ in range(num_batches):
            if epoch not in self.num_steps:
                whole = dataset.plan(epoch).num_steps
                self.num_steps[epoch] = int(whole * limit) if isinstance(limit, float) else min(whole, limit)
            yield epoch, step
            step += 1
            if step >= self.num_steps[epoch]:
                if stop_at_epoch:
                    return
                epoch, step = epoch if overfit_batches else epoch + 1, 0


class StreamSampler(SequentialSampler, DistributedSampler[Any]):
    """Samples the training stream from its current position; every iteration has as many batches as epoch 0.

    To Lightning it is sequential and already distributed, so that neither `overfit_batches` nor
    `use_distributed_sampler` replaces it. Without a `stream` it reads all of epoch 0, for validation and test.
    """

    def __init__(
        self, dataset: LaneDataset, stream: Callable[[LaneDataset, int], Iterator[tuple[int, int]]] | None
    ) -> None:
        self.lanes, self.stream = dataset, stream

    def __iter__(self) -> Iterator[Any]:
        if self.stream is not None:
            return self.stream(self.lanes, len(self))
        return iter([(0, step) for step in range(len(self))])

    def __len__(self) -> int:
        return len(self.lanes)
