"""Settle trainer settings that contradict each other: of two, the one that is given last wins."""

from collections.abc import Callable
from enum import Enum
from typing import Any

from jsonargparse import Namespace

from dsmr import UserError
from dsmr.cli.given_settings import COMMAND_LINE
from dsmr.cli.trainer_checks import check_callbacks

Level = Callable[[str], float]  # returns the level at which a setting is given, see `level_given`


def settle_trainer(trainer: Namespace, command: str, level: Level) -> None:
    """Settle the settings of the trainer for a command."""
    if isinstance(trainer.callbacks, Namespace):  # a single one
        trainer.callbacks = [trainer.callbacks]
    plain_strings(trainer)
    check_callbacks(trainer.callbacks)
    settle_length(trainer, level)
    is_endless = trainer.max_steps == -1 and trainer.max_epochs in (None, -1) and trainer.max_time is None
    if command == "fit" and is_endless:  # Lightning would stop it after 1,000 epochs
        raise UserError("nothing ends the run: set trainer.max_steps, trainer.max_epochs or trainer.max_time")
    settle_validation(trainer, level)
    if command == "validate" and trainer.limit_val_batches == 0 and level("trainer.limit_val_batches") < COMMAND_LINE:
        trainer.limit_val_batches = None  # of a run that was trained without validation


def plain_strings(settings: Any) -> Any:
    """Replace members of string enums, which YAML cannot hold, by their strings."""
    if isinstance(settings, Namespace):
        for key, value in vars(settings).items():
            settings[key] = plain_strings(value)
    elif isinstance(settings, list):
        return [plain_strings(value) for value in settings]
    elif isinstance(settings, Enum) and isinstance(settings, str):
        return str(settings.value)
    return settings


def settle_length(trainer: Namespace, level: Level) -> None:
    """Let `max_epochs` remove a `max_steps` that was set before it, and the reverse.

    base.yaml sets `max_steps`, which would otherwise still apply after `--trainer.max_epochs 3`. If both are on the
    command line, both apply. -1 means no limit and removes none.
    """
    steps, epochs = level("trainer.max_steps"), level("trainer.max_epochs")
    if trainer.max_epochs in (None, -1):
        return
    if epochs > steps:
        trainer.max_steps = -1
    elif steps > epochs and trainer.max_steps != -1:
        trainer.max_epochs = None


def settle_validation(trainer: Namespace, level: Level) -> None:
    """Let the last of a validation interval in batches, in parts of an epoch or in epochs replace the others."""
    interval, every = level("trainer.val_check_interval"), level("trainer.check_val_every_n_epoch")
    if isinstance(trainer.val_check_interval, float) and trainer.check_val_every_n_epoch is None:
        trainer.check_val_every_n_epoch = 1
    elif trainer.check_val_every_n_epoch is not None and every > interval:
        trainer.val_check_interval = 1.0
    elif isinstance(trainer.val_check_interval, int) and interval > every:
        trainer.check_val_every_n_epoch = None


def settle_root(settings: Namespace, level: Level) -> None:
    """Use `trainer.default_root_dir` as the folder of runs."""
    folder = settings.trainer.default_root_dir
    if folder is None or str(folder) == settings.root:
        return
    own, lightnings = level("root"), level("trainer.default_root_dir")
    if own == lightnings:
        both = f"--root {settings.root} and trainer.default_root_dir {folder}"
        raise UserError(f"{both} both name the folder of runs; give one")
    if lightnings > own:
        settings.root = str(folder)
