"""Lightning callbacks on public hooks, one idea each."""

from dsmr.callbacks.best_checkpoint import BestCheckpoint
from dsmr.callbacks.epoch_time import EpochTime
from dsmr.callbacks.last_checkpoint import LastCheckpoint
from dsmr.callbacks.lost_process import LostProcess
from dsmr.callbacks.peak_memory import PeakMemory
from dsmr.callbacks.samples import Samples
from dsmr.callbacks.stop_signals import Stopped
from dsmr.callbacks.throughput import Throughput

__all__ = [
    "BestCheckpoint",
    "EpochTime",
    "LastCheckpoint",
    "LostProcess",
    "PeakMemory",
    "Samples",
    "Stopped",
    "Throughput",
]
