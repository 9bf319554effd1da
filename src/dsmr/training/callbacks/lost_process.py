"""One line where another process of a run is lost."""

import os
import re
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

LOST_PROCESS = re.compile(r"gloo|NCCL|Connection|Timed out|Socket|Broken pipe|timeout", re.IGNORECASE)


class LostProcess(Callback):
    """Says that another process has ended, as soon as this one hears of it.

    Lightning looks for ended processes every five seconds and then kills all others, this one too: what is printed
    after its teardown may never be read.

    Args:
        folder: the run.

    Attributes:
        is_lost: whether another process was lost.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.is_lost = folder, False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print one line if the exception is that of a lost connection."""
        is_lost = isinstance(exception, RuntimeError) and LOST_PROCESS.search(str(exception)) is not None
        if trainer.world_size == 1 or not is_lost:
            return
        self.is_lost = True
        reason = str(exception).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        line = (
            f"dsmr: error: another process of this run has ended, or does not answer ({reason}); see what it said, "
            f"then resume with dsmr fit --resume {self.folder}\n"
        )
        os.write(2, line.encode())
