"""Everything of Lightning that is not its public interface, in one file.

Each function says why the public interface does not do. `tests/test_lightning_internals.py` fails with the name of
the function if a new Lightning moves what it needs.
"""

from typing import Any, Literal

from lightning import LightningModule, Trainer

Validation = Literal["none", "running", "ending", "over"]
"""Progress of the validation that follows a training batch: not due, begun, in its last hook, or complete."""


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the trainer of a module, None without one; `module.trainer` raises instead."""
    return module._trainer


def is_validation_due(trainer: Trainer) -> bool:
    """Return True if a validation follows the present training batch; Lightning decides it after all hooks."""
    fit_loop = trainer.fit_loop
    assert fit_loop._data_fetcher is not None
    return fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)


def set_max_steps(trainer: Trainer, max_steps: int) -> None:
    """Change `trainer.max_steps`, which has no setter."""
    trainer.fit_loop.epoch_loop.max_steps = max_steps


def is_epoch_ending(trainer: Trainer) -> bool:
    """Return True in the hooks of an epoch's end, where Lightning's counters are right for a checkpoint."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    return bool(epochs.processed > epochs.completed)


def is_batch_ending(trainer: Trainer) -> bool:
    """Return True in the hooks of a batch's end, before its metrics are logged and its validation is decided."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(batches.processed > batches.completed)


def settle_counters(checkpoint: dict[str, Any], validation: Validation) -> None:
    """Set Lightning's counters in a checkpoint to a point between two batches.

    Lightning counts a batch as begun before its hooks, and as logged after its validation. Depending on the hook that
    saves, a resumed run would log at other steps, or skip a validation. After this, every checkpoint is one of two:
    after a batch whose validation, if any, is complete; or before that validation, which then runs first.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    batches, segments = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_loop.val_loop.batch_progress"]
    for counts in (batches["total"], batches["current"]):
        counts["completed"] = counts["processed"]
    for counts in (batches["total"], batches["current"], segments["total"], segments["current"]):
        counts["ready"] = counts["started"] = counts["processed"] = counts["completed"]
    if validation == "over":
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # Lightning adds it again when it resumes
    if validation == "running":
        begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        segments["total"], segments["current"] = begun, dict.fromkeys(begun, 0)
        segments["is_last_batch"] = False
