"""Lightning callbacks on public hooks, one idea each."""

from dsmr.callbacks.best_checkpoint import BestCheckpoint
from dsmr.callbacks.epoch_time import EpochTime
from dsmr.callbacks.last_checkpoint import LastCheckpoint

__all__ = ["BestCheckpoint", "EpochTime", "LastCheckpoint"]
