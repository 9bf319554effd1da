"""Speed and memory of schedules, baselines and peers, side by side in one process.

Every row trains or decodes the same tokens in the middle of a piece: its memory is full. Rows take turns, so that a
machine that slows down slows all of them; ratios are medians over the turns of what two rows did in the same turn.

`settings` (what is compared) -> `training`, `decoding` (the rows) -> `run` (taking turns); `pieces`: what a piece of
so many tokens takes; `quality`: what a row has learned after so many tokens; `machine`: where it was measured.
"""

from dsmr.benchmark.runner import run
from dsmr.benchmark.settings import Settings, Workload

__all__ = ["Settings", "Workload", "run"]
