"""The checkpoint that a run is resumed from: when it is saved, and how a run ends early without losing anything."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, Timer

from dsmr import UserError
from dsmr.results.run_files import LAST_FILE
from dsmr.training.callbacks.stop_signals import Stopped, StopSignals, describe
from dsmr.training.callbacks.throughput import is_logged
from dsmr.training.csv_logger import MetricsLogger
from dsmr.training.module import NotFiniteError

METRICS_ROWS = "metrics_rows"
OUT_OF_TIME = 1000  # greater than any signal's number


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` every so many optimizer steps or minutes, around validations, and when training is to stop.

    It stands at an optimizer step, never within an accumulation of gradients. Where a validation begins, it is saved
    before it, so that nothing is lost to a long one, and again after it, with its score; what is resumed from the
    first one begins with that validation.

    SIGTERM, SIGUSR1, Ctrl-C and `trainer.max_time` end training after the optimizer step, with `Stopped`; during a
    validation at once, since it is done again from its beginning.

    Args:
        folder: the run.
        every_n_steps: optimizer steps between two savings.
        every_minutes: minutes between two savings at most.

    Raises:
        UserError: a number of steps below 1, or no minutes.
    """

    def __init__(self, folder: Path, every_n_steps: int = 500, every_minutes: float = 10.0) -> None:
        if every_n_steps < 1 or every_minutes <= 0:
            raise UserError(
                f"save_every_n_steps ({every_n_steps}) must be at least 1, and save_every_minutes ({every_minutes}) "
                "above 0"
            )
        self.folder, self.every_n_steps, self.every_minutes = folder, every_n_steps, every_minutes
        self.signals = StopSignals()
        self._saved_at = self._step = 0
        self._saved_when = time.monotonic()
        self._is_due = self._is_boundary = False
        self._is_out_of_time = False
        self._metrics: MetricsLogger | None = None
        self._validation = "none"  # since the last batch: none, running, ending or over
        self._max_steps: int | None = None  # while a validation that was cut off is still to come

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with a validation that was cut off even after the last step, where Lightning would end at once.

        Not with strategies that restore callbacks after this hook (FSDP, DeepSpeed): there the run ends at once.
        """
        if self._validation == "running":
            self._max_steps = trainer.max_steps
            if trainer.max_steps > 0:
                trainer.fit_loop.epoch_loop.max_steps += 1  # put back before anything trains

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to listen to signals; training stands at an optimizer step, fresh or resumed."""
        self.signals.listen()
        self._metrics = next((logger for logger in trainer.loggers if isinstance(logger, MetricsLogger)), None)
        self._saved_at = self._step = trainer.global_step
        self._saved_when = time.monotonic()
        self._is_boundary = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save what is due; stop if that was asked for."""
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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Find a saving due, and time over."""
        step = trainer.global_step
        self._is_boundary, self._step, self._validation = step != self._step, step, "none"
        if trainer.should_stop and is_out_of_time(trainer):  # Lightning would validate first, or stop too early
            trainer.should_stop, self._is_out_of_time = False, True
        if self._is_boundary:
            minutes = (time.monotonic() - self._saved_when) / 60
            is_late = greatest(trainer, int(minutes >= self.every_minutes)) > 0
            self._is_due = is_late or step % self.every_n_steps == 0 or step == trainer.max_steps

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save before a validation that may take long."""
        if is_training(trainer):
            self._put_back(trainer)
            self._validation = "running"
            if self._is_boundary:
                self._save(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop within a validation if that was asked for."""
        if self._is_boundary and is_training(trainer):
            self._stop_if_asked(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the validation is done, before any callback saves its score."""
        if is_training(trainer):
            self._validation = "ending"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save again, now that the best checkpoint is settled."""
        if is_training(trainer):
            if self._is_boundary:
                self._save(trainer)
            self._validation = "over"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where training stopped."""
        if self._is_boundary and (self._is_due or trainer.global_step != self._saved_at):
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the state before a step that failed for its numbers, where it still stands."""
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            print(f"stopped at once; {LAST_FILE} in {self.folder} holds step {self._saved_at:,}", file=sys.stderr)
        if isinstance(exception, NotFiniteError) and exception.is_undone:
            self._save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self.signals.leave()

    def state_dict(self) -> dict[str, Any]:
        """Rows of `metrics.csv` that are known, and how far the last batch's validation is.

        Written first, so that a checkpoint of any other callback loses no row either.
        """
        return self._state(self._validation)

    def _state(self, validation: str, num_pending: int = 0) -> dict[str, Any]:
        rows = {}
        if self._metrics is not None:
            self._metrics.save()
            rows[METRICS_ROWS] = self._metrics.num_rows + num_pending
        is_over = validation in ("ending", "over")
        return {**rows, "is_validated": is_over, "is_validating": validation == "running"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after a validation that is over, or with one that was cut off."""
        is_running = state_dict.get("is_validating", False)
        self._validation = "over" if state_dict.get("is_validated") else "running" if is_running else "none"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let Lightning's counters stand exactly at the optimizer step.

        Another callback may save at the end of a batch, before its row is logged and its validation is done, or at the
        end of an epoch, where Lightning counts right.
        """
        epochs = trainer.fit_loop.epoch_progress.current
        if epochs.processed > epochs.completed:  # type: ignore[attr-defined]
            return
        batches, validation = trainer.fit_loop.epoch_loop.batch_progress.current, self._validation
        if batches.processed > batches.completed:  # type: ignore[attr-defined]
            is_due = trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
            validation = "running" if is_due else "none"
            checkpoint["callbacks"][self.state_key] = self._state(validation, num_pending=int(is_logged(trainer)))
            if not is_due:  # which Lightning counts right
                return
        settle(checkpoint["loops"]["fit_loop"], validation)

    def _put_back(self, trainer: Trainer) -> None:
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None

    def _stop_if_asked(self, trainer: Trainer) -> None:
        number = greatest(trainer, self.signals.received or OUT_OF_TIME * self._is_out_of_time)
        if not number:
            return
        self._save(trainer)
        if number == OUT_OF_TIME:
            raise Stopped("trainer.max_time is over")
        raise Stopped(describe(number), 128 + number)

    def _save(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()  # so that what was logged before is never missing after
        trainer.save_checkpoint(self.folder / LAST_FILE, weights_only=False)
        self._saved_at, self._saved_when, self._is_due = trainer.global_step, time.monotonic(), False


def is_training(trainer: Trainer) -> bool:
    """Whether a validation belongs to training."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def is_out_of_time(trainer: Trainer) -> bool:
    """Whether `trainer.max_time` is over."""
    left = [timer.time_remaining() for timer in trainer.callbacks if isinstance(timer, Timer)]  # type: ignore[attr-defined]
    return any(seconds is not None and seconds <= 0 for seconds in left)


def greatest(trainer: Trainer, value: int) -> int:
    """The greatest value of all processes, so that they decide alike."""
    if trainer.world_size == 1:
        return value
    shared = torch.tensor(value, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return int(shared)


def settle(fit_loop: dict[str, Any], validation: str) -> None:
    """Let the counters of Lightning's loops stand between two batches.

    Lightning counts a batch as begun before its hooks, and as logged after its validation; depending on the hook
    that saves, it would log at other steps after resuming, or leave a validation out. Here every saving is one of
    two: after a batch whose validation, if any, is over, or before its validation, which is then done first.

    Args:
        fit_loop: state of the loop in a checkpoint, changed in place.
        validation: after the last batch: `none`, `running`, `ending` (its last hook) or `over`.
    """
    batches, segments = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_loop.val_loop.batch_progress"]
    for counts in (batches["total"], batches["current"]):
        counts["completed"] = counts["processed"]
    for counts in (batches["total"], batches["current"], segments["total"], segments["current"]):
        counts["ready"] = counts["started"] = counts["processed"] = counts["completed"]
    if validation == "over":
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # Lightning adds it again
    if validation == "running":
        begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        segments["total"], segments["current"] = begun, dict.fromkeys(begun, 0)
        segments["is_last_batch"] = False
