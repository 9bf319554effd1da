"""The checkpoint that a run resumes from: when it is saved, and how training ends early without losing anything."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, Timer

from dsmr import UserError
from dsmr.results.run_files import LAST_FILE
from dsmr.training.callbacks.stop_signals import Stopped, StopSignals, signal_name
from dsmr.training.callbacks.throughput import is_logged
from dsmr.training.csv_logger import MetricsLogger
from dsmr.training.lightning_internals import (
    Validation,
    is_batch_ending,
    is_epoch_ending,
    is_validation_due,
    set_max_steps,
    settle_counters,
)
from dsmr.training.losses import NotFiniteError

METRICS_ROWS = "metrics_rows"
OUT_OF_TIME = 1000  # greater than any signal's number


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` every `every_n_steps` or `every_minutes`, around validations, and when training is to stop.

    It is always taken at an optimizer step, never within an accumulation of gradients. A validation is saved before,
    so that a long one costs nothing, and again after it, with its score; a run that resumes from the first of the two
    begins with that validation.

    SIGTERM, SIGUSR1, Ctrl-C and `trainer.max_time` end training with `Stopped` after the optimizer step, or at once
    during a validation, which a resumed run repeats.
    """

    def __init__(self, folder: Path, every_n_steps: int = 500, every_minutes: float = 10.0) -> None:
        if every_n_steps < 1 or every_minutes <= 0:
            raise UserError(
                f"save_every_n_steps ({every_n_steps}) must be at least 1, and save_every_minutes ({every_minutes}) "
                "above 0"
            )
        self.folder, self.every_n_steps, self.every_minutes = folder, every_n_steps, every_minutes
        self.signals = StopSignals()
        self._saved_at, self._saved_when, self._step = 0, time.monotonic(), 0
        self._is_due = self._is_boundary = self._is_out_of_time = False
        self._metrics: MetricsLogger | None = None
        self._validation: Validation = "none"  # that of the last batch
        self._max_steps: int | None = None  # the user's, while a validation that was cut off is still to come

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Repeat a validation that was cut off, even after the last step, where Lightning would end at once.

        Not with strategies that restore callbacks after this hook (FSDP, DeepSpeed): there the run ends at once.
        """
        if self._validation == "running":
            self._max_steps = trainer.max_steps
            if trainer.max_steps > 0:
                set_max_steps(trainer, trainer.max_steps + 1)  # put back before anything trains

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to listen to signals; training is at an optimizer step, fresh or resumed."""
        self.signals.listen()
        self._metrics = next((logger for logger in trainer.loggers if isinstance(logger, MetricsLogger)), None)
        self._saved_at = self._step = trainer.global_step
        self._saved_when, self._is_boundary = time.monotonic(), True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save if a checkpoint is due; stop if asked to."""
        self._put_back(trainer)
        if 0 < trainer.max_steps <= trainer.global_step:
            raise UserError(
                f"training was cut off in the validation after its last step, {trainer.max_steps:,}, which these "
                "options leave out; resume without trainer.val_check_interval and trainer.limit_val_batches, or with "
                "a greater trainer.max_steps"
            )
        if self._is_boundary:
            if self._is_due:
                self._save(trainer)
            self._stop_if_asked(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Note whether a checkpoint is due, and whether time is over."""
        step = trainer.global_step
        self._is_boundary, self._step, self._validation = step != self._step, step, "none"
        if trainer.should_stop and is_out_of_time(trainer):  # Lightning would validate first, or stop too early
            trainer.should_stop, self._is_out_of_time = False, True
        if self._is_boundary:
            minutes = (time.monotonic() - self._saved_when) / 60
            is_late = max_over_processes(trainer, int(minutes >= self.every_minutes)) > 0
            self._is_due = is_late or step % self.every_n_steps == 0 or step == trainer.max_steps

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save before a validation, which may take long."""
        if is_training(trainer):
            self._put_back(trainer)
            self._validation = "running"
            if self._is_boundary:
                self._save(trainer)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop within a validation if asked to."""
        if self._is_boundary and is_training(trainer):
            self._stop_if_asked(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the validation is complete, before any callback saves its score."""
        if is_training(trainer):
            self._validation = "ending"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save again, now that the best checkpoint is settled."""
        if is_training(trainer):
            if self._is_boundary:
                self._save(trainer)
            self._validation = "over"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of training."""
        if self._is_boundary and (self._is_due or trainer.global_step != self._saved_at):
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the state before a step whose loss or gradient was NaN or Inf, if that step changed nothing."""
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            print(f"stopped at once; {LAST_FILE} in {self.folder} holds step {self._saved_at:,}", file=sys.stderr)
        if isinstance(exception, NotFiniteError) and exception.is_undone:
            self._save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self.signals.leave()

    def state_dict(self) -> dict[str, Any]:
        """Return how many rows of `metrics.csv` belong to the checkpoint, and the progress of the validation."""
        return self._state(self._validation)

    def _state(self, validation: Validation, num_pending: int = 0) -> dict[str, Any]:
        rows = {}
        if self._metrics is not None:
            self._metrics.save()  # first, so that checkpoints of other callbacks lose no rows either
            rows[METRICS_ROWS] = self._metrics.num_rows + num_pending
        return {**rows, "is_validated": validation in ("ending", "over"), "is_validating": validation == "running"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume after a complete validation, or with one that was cut off."""
        is_running = state_dict.get("is_validating", False)
        self._validation = "over" if state_dict.get("is_validated") else "running" if is_running else "none"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set Lightning's counters in the checkpoint to the optimizer step."""
        if is_epoch_ending(trainer):  # Lightning's counters are right
            return
        validation = self._validation
        if is_batch_ending(trainer):  # another callback saves, before the row is logged and the validation is done
            is_due = is_validation_due(trainer)
            validation = "running" if is_due else "none"
            checkpoint["callbacks"][self.state_key] = self._state(validation, num_pending=int(is_logged(trainer)))
            if not is_due:  # Lightning's counters are right here too
                return
        settle_counters(checkpoint, validation)

    def _put_back(self, trainer: Trainer) -> None:
        if self._max_steps is not None:
            set_max_steps(trainer, self._max_steps)
            self._max_steps = None

    def _stop_if_asked(self, trainer: Trainer) -> None:
        number = max_over_processes(trainer, self.signals.received or OUT_OF_TIME * self._is_out_of_time)
        if not number:
            return
        self._save(trainer)
        if number == OUT_OF_TIME:
            raise Stopped("trainer.max_time is over")
        raise Stopped(signal_name(number), 128 + number)

    def _save(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()  # first, so that no row that the checkpoint counts can be missing
        trainer.save_checkpoint(self.folder / LAST_FILE, weights_only=False)
        self._saved_at, self._saved_when, self._is_due = trainer.global_step, time.monotonic(), False


def is_training(trainer: Trainer) -> bool:
    """Return True if a validation is part of training."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def is_out_of_time(trainer: Trainer) -> bool:
    """Return True if `trainer.max_time` is over."""
    left = [timer.time_remaining() for timer in trainer.callbacks if isinstance(timer, Timer)]  # type: ignore[attr-defined]
    return any(seconds is not None and seconds <= 0 for seconds in left)


def max_over_processes(trainer: Trainer, value: int) -> int:
    """Return the maximum over all processes, so that they decide alike."""
    if trainer.world_size == 1:
        return value
    shared = torch.tensor(value, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return int(shared)
