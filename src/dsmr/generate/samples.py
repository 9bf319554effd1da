"""A callback that generates a sample of music at regular steps of training, as MIDI and as a piano roll."""

from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from dsmr import UserError
from dsmr.data.tokenizer import decode
from dsmr.data.vocabulary import BOS
from dsmr.generate import Generator, Sampling
from dsmr.generate.piano_roll import plot_piano_roll
from dsmr.model.backbone import evaluation_copy
from dsmr.training.callbacks.throughput import Throughput


class Samples(Callback):
    """Writes `samples/step-N.mid`, and `.png` beside it if matplotlib is installed; wandb gets the plot as well.

    Samples start from nothing and have random generators of their own, so that they do not change training.

    With 0 for `every_n_steps` there are none. Their length is about `seconds` of music, by the data's mean number of
    tokens per second. `clock` measures the speed of training, and is paused meanwhile.
    """

    def __init__(
        self, folder: Path, every_n_steps: int = 5000, seconds: float = 10.0, clock: Throughput | None = None
    ) -> None:
        if every_n_steps < 0 or seconds <= 0:
            raise UserError(f"sample_every_n_steps ({every_n_steps}) must be at least 0, seconds ({seconds}) above 0")
        self.folder, self.every_n_steps, self.seconds = folder / "samples", every_n_steps, seconds
        self.clock, self._last = clock, 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write a sample at every n-th optimizer step."""
        step = trainer.global_step
        if self.every_n_steps and step and step % self.every_n_steps == 0 and step != self._last:
            self._last = step
            if self.clock:
                self.clock.pause(trainer, pl_module)
            if trainer.is_global_zero:
                self._write(trainer, pl_module, step)
            if self.clock:
                self.clock.resume(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: Any, step: int) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        tokenizer, count = data.tokenizer, round(self.seconds * data.tokens_per_second)
        steps = Generator(evaluation_copy(pl_module.backbone), tokenizer, Sampling(top_p=1.0)).tokens(may_end=False)
        ids = [BOS, *(token for (token,) in islice(steps, count))]
        score = decode(tokenizer, ids)
        self.folder.mkdir(parents=True, exist_ok=True)
        score.dump_midi(self.folder / f"step-{step:07d}.mid")
        if find_spec("matplotlib") is None:
            return
        plot = self.folder / f"step-{step:07d}.png"
        plot_piano_roll(score, plot, title=f"{self.folder.parent.name}, step {step:,}")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [str(plot)], step=step)
