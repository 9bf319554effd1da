"""A line on the screen when another process of a distributed run is lost."""

import os
import re
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

LOST_PROCESS = re.compile(r"gloo|NCCL|Connection|Timed out|Socket|Broken pipe|timeout", re.IGNORECASE)


class LostProcess(Callback):
    """Reports that another process has ended, as soon as a collective operation fails.

    Lightning looks for ended processes every five seconds and then kills all others, this one too: a line printed
    after its teardown may never be seen. `is_lost` is True from then on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.is_lost = folder, False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print one line for the exception of a lost connection."""
        is_lost = isinstance(exception, RuntimeError) and LOST_PROCESS.search(str(exception)) is not None
        if trainer.world_size == 1 or not is_lost:
            return
        self.is_lost = True
        reason = str(exception).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        line = (
            f"dsmr: error: another process of this run has ended, or does not answer ({reason}); see its own message, "
            f"then resume with dsmr fit --resume {self.folder}\n"
        )
        os.write(2, line.encode())
