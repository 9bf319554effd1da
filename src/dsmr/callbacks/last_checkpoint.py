"""The checkpoint that a run is resumed from."""

import os
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from dsmr.checkpoint import LAST


class LastCheckpoint(Callback):
    """Saves `last.ckpt` every so many optimizer steps and at the end; a good one is replaced, never overwritten.

    Args:
        folder: the run.
        every_n_steps: optimizer steps between two savings.
    """

    def __init__(self, folder: Path, every_n_steps: int = 500) -> None:
        self.folder, self.every_n_steps = folder, every_n_steps
        self._saved_at = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at every n-th optimizer step, and at the last one."""
        step = trainer.global_step
        if (step % self.every_n_steps == 0 or step == trainer.max_steps) and step != self._saved_at:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where training stopped."""
        if trainer.global_step != self._saved_at:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._saved_at = trainer.global_step
        partial = self.folder / f".{LAST}.partial"
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            os.replace(partial, self.folder / LAST)  # noqa: PTH105 (atomic, and says so)
