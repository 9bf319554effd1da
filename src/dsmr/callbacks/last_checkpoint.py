"""The checkpoint that a run is resumed from."""

import os
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from dsmr.checkpoint import LAST


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` every so many optimizer steps and at the end; a good one is replaced, never overwritten.

    Where a validation is due at the same step, it is saved after it, so that it knows the best score so far: until
    then, or until the next batch begins, it is only due.

    Args:
        folder: the run.
        every_n_steps: optimizer steps between two savings.

    Raises:
        ValueError: `every_n_steps` is below 1.
    """

    def __init__(self, folder: Path, every_n_steps: int = 500) -> None:
        if every_n_steps < 1:
            raise ValueError(f"save_every_n_steps is {every_n_steps}; it must be at least 1")
        self.folder, self.every_n_steps = folder, every_n_steps
        self._saved_at = 0
        self._is_due = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Find a saving due at every n-th optimizer step."""
        step = trainer.global_step
        self._is_due |= step != self._saved_at and (step % self.every_n_steps == 0 or step == trainer.max_steps)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what is due, now that the best checkpoint is settled."""
        if self._is_due and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save what is due and met no validation."""
        if self._is_due:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where training stopped."""
        if self._is_due or trainer.global_step != self._saved_at:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._saved_at, self._is_due = trainer.global_step, False
        partial = self.folder / f".{LAST}.partial"
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            os.replace(partial, self.folder / LAST)  # noqa: PTH105 (atomic, and says so)
