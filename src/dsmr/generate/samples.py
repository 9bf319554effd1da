"""Music from the model as it learns: a MIDI file and a picture of it every so often."""

from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from dsmr import UserError
from dsmr.data.tokenizer import BOS, decode
from dsmr.generate import Generator, Sampling
from dsmr.generate.piano_roll import plot_piano_roll
from dsmr.model.backbone import evaluation_copy
from dsmr.training.callbacks.throughput import Throughput


class Samples(Callback):
    """Writes `samples/step-N.mid`, and `.png` beside it where matplotlib is installed; wandb gets the picture too.

    The music begins from nothing and is drawn with a generator of its own, so that training goes on as without it.

    Args:
        folder: the run.
        every_n_steps: optimizer steps between two samples; 0 means none.
        seconds: of music, about: a sample has so many seconds' mean number of tokens in the data.
        clock: measures training, and stops meanwhile.

    Raises:
        UserError: a negative number of steps, or no music.
    """

    def __init__(
        self, folder: Path, every_n_steps: int = 5000, seconds: float = 10.0, clock: Throughput | None = None
    ) -> None:
        if every_n_steps < 0 or seconds <= 0:
            raise UserError(f"sample_every_n_steps ({every_n_steps}) must not be below 0, nor the seconds ({seconds})")
        self.folder, self.every_n_steps, self.seconds = folder / "samples", every_n_steps, seconds
        self.clock = clock
        self._last = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a sample at every n-th optimizer step."""
        step = trainer.global_step
        if self.every_n_steps and step and step % self.every_n_steps == 0 and step != self._last:
            self._last = step
            if self.clock:
                self.clock.pause(pl_module)
            if trainer.is_global_zero:
                self._write(trainer, pl_module, step)
            if self.clock:
                self.clock.resume(pl_module)

    def _write(self, trainer: Trainer, pl_module: Any, step: int) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        tokenizer, count = data.tokenizer, round(self.seconds * data.tokens_per_second)
        drawn = Generator(evaluation_copy(pl_module.backbone), tokenizer, Sampling(top_p=1.0)).tokens(may_end=False)
        ids = [BOS, *(token for (token,) in islice(drawn, count))]
        score = decode(tokenizer, ids)
        self.folder.mkdir(parents=True, exist_ok=True)
        score.dump_midi(self.folder / f"step-{step:07d}.mid")
        if find_spec("matplotlib") is None:
            return
        picture = self.folder / f"step-{step:07d}.png"
        plot_piano_roll(score, picture, title=f"{self.folder.parent.name}, step {step:,}")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [str(picture)], step=step)
