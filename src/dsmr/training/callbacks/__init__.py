"""Lightning callbacks of a training run, one idea each."""

from dsmr.training.callbacks.best_checkpoint import BestCheckpoint
from dsmr.training.callbacks.epoch_time import EpochTime
from dsmr.training.callbacks.last_checkpoint import LastCheckpoint
from dsmr.training.callbacks.lost_process import LostProcess
from dsmr.training.callbacks.peak_memory import PeakMemory
from dsmr.training.callbacks.stop_signals import Stopped
from dsmr.training.callbacks.throughput import Throughput

__all__ = ["BestCheckpoint", "EpochTime", "LastCheckpoint", "LostProcess", "PeakMemory", "Stopped", "Throughput"]
