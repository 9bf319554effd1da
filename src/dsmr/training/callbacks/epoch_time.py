"""The time that an epoch will take, measured on the first steps of a run."""

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from dsmr.batch import Segment


class EpochTime(Callback):
    """Prints tokens per second and the time per epoch after a few steps, once in a run.

    Args:
        warmup_steps: first batches, which are not timed.
        timed_steps: batches that are timed, without validations in between.
    """

    def __init__(self, warmup_steps: int = 5, timed_steps: int = 15) -> None:
        self.warmup_steps, self.timed_steps = warmup_steps, timed_steps
        self._batches = 0
        self._began = self._seconds = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Start the clock of a batch."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Segment, batch_idx: int
    ) -> None:
        """Add up the timed batches, and print after the last one."""
        self._batches += 1
        if self._batches > self.warmup_steps:
            self._seconds += time.perf_counter() - self._began
        if self._batches != self.warmup_steps + self.timed_steps:
            return
        seconds, batch_tokens = self._seconds / self.timed_steps, batch.tokens_BT.numel() * trainer.world_size
        epoch = format_duration(seconds * float(trainer.num_training_batches))
        message = f"{batch_tokens / seconds:,.0f} tokens/s: one epoch takes {epoch}"
        steps = trainer.max_steps - trainer.global_step
        if steps > 0:
            rest = format_duration(seconds * steps * trainer.accumulate_grad_batches)
            message += f", the {steps:,} steps to come {rest}"
        trainer.print(f"{message} (validation not counted)")


def format_duration(seconds: float) -> str:
    """Return `2 h 05 min`, `3.4 min` or `12 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
