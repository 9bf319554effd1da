"""Continuations that `Trainer.predict` makes, as MIDI files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from dsmr import UserError
from dsmr.data.files import atomic_write
from dsmr.generate.continuer import Predicted


class MidiWriter(BasePredictionWriter):
    """Writes `NAME.mid` for each piece; with several continuations `NAME-1.mid`, `NAME-2.mid`.

    Args:
        folder: made where it is not there.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__("batch")
        self.folder = folder
        self.num_written = 0

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Predicted,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one piece's continuations.

        Raises:
            UserError: they cannot be written.
        """
        stem = Path(prediction.name).stem
        many = len(prediction.made) > 1
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for number, one in enumerate(prediction.made, start=1):
                path = self.folder / (f"{stem}-{number}.mid" if many else f"{stem}.mid")
                with atomic_write(path) as file:
                    file.write(one.score.dumps_midi())
                self.num_written += 1
        except OSError as error:
            raise UserError(f"cannot write to {self.folder} ({error.strerror or error})") from error
