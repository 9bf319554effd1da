"""PyTorch dataset over a token store: segments of lanes by (epoch, step)."""

from dataclasses import dataclass

from torch.utils.data import Dataset

from dsmr.batch import Segment
from dsmr.data.lanes import LaneReader, Plan, plan_stream
from dsmr.data.sources import Split
from dsmr.data.windows import Windows, plan_random_windows, plan_strided_windows, plan_training_windows


@dataclass(frozen=True)
class Planner:
    """Makes the plan of an epoch of a split: streams in lanes, or isolated windows.

    Attributes:
        split: train, validation or test.
        numbers: numbers of the pieces in the store.
        lengths: tokens of each piece, BOS included.
        segment_length: T.
        num_lanes: lanes of all processes together.
        seed: seed of dealing and cutting.
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
        """Plan an epoch."""
        pieces, length, lanes = (self.numbers, self.lengths), self.segment_length, self.num_lanes
        if self.windows is None:
            return plan_stream(*pieces, segment_length=length, num_lanes=lanes, seed=self.seed, epoch=epoch)
        if self.split == "train":
            return plan_training_windows(*pieces, window=length, num_lanes=lanes, seed=self.seed, epoch=epoch)
        if self.windows.protocol == "random":
            return plan_random_windows(*pieces, window=length, num_lanes=lanes, seed=self.seed)
        return plan_strided_windows(*pieces, window=length, stride=self.windows.stride, num_lanes=lanes)


class LaneDataset(Dataset[Segment]):
    """Batches by (epoch, step). Stateless, so that the stream does not depend on the number of loader workers.

    Args:
        reader: makes a batch.
        planner: makes the plan of an epoch.
        lanes: lanes of this process among those of all processes.
    """

    def __init__(self, reader: LaneReader, planner: Planner, lanes: slice) -> None:
        self.reader, self.planner, self.lanes = reader, planner, lanes
        self._plan: tuple[int, Plan] | None = None
        self._num_steps: int | None = None

    def plan(self, epoch: int) -> Plan:
        """Return the plan of an epoch over the lanes of all processes; the last one is cached."""
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, self.planner(epoch))
        return self._plan[1]

    def __getitem__(self, index: tuple[int, int]) -> Segment:
        epoch, step = index
        return self.reader.read_segment(self.plan(epoch), step, self.lanes, epoch)

    def __len__(self) -> int:
        """Number of batches of epoch 0; with windows, other epochs have a few more or less."""
        if self._num_steps is None:
            self._num_steps = self.planner(0).num_steps
        return self._num_steps
