"""Check the settings of the trainer, and settle those that contradict each other: the one given last wins.

The checks are those that Lightning makes late or unclearly. Each raises `UserError`, naming the key.
"""

import inspect
import os
import re
from collections.abc import Callable
from datetime import timedelta
from enum import Enum
from importlib.util import find_spec
from typing import Any

from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ParallelStrategy, Strategy, StrategyRegistry

from dsmr import UserError
from dsmr.cli import nearest
from dsmr.cli.given_settings import COMMAND_LINE
from dsmr.cli.type_words import path_of, shown_value, subclasses

Level = Callable[[str], float]  # returns the level at which a setting is given, see `level_given`
LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "min_epochs": 0,
    "min_steps": 0,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
}
NEEDED = {
    "fit": ("max_steps", "max_epochs", "limit_train_batches"),
    "validate": ("limit_val_batches",),
    "test": ("limit_test_batches",),
}
"""Settings that leave a command nothing to do if they are 0."""
UNSUPPORTED_CALLBACKS = {
    "LearningRateFinder": "compare learning rates with dsmr sweep learning_rate",
    "BatchSizeFinder": "the batch is data.num_lanes; dsmr estimate says how many lanes fit a GPU",
    "BackboneFinetuning": "it would freeze the whole network, which is the backbone",
}
COPIED = ("spawn", "fork", "notebook")
"""Strategies that copy the first process, which holds objects that cannot be copied."""


def settle_trainer(trainer: Namespace, command: str, level: Level) -> None:
    """Settle the settings of the trainer for a command."""
    if isinstance(trainer.callbacks, Namespace):  # a single one
        trainer.callbacks = [trainer.callbacks]
    plain_strings(trainer)
    for callback in trainer.callbacks or []:
        name = callback.class_path.rpartition(".")[2]
        if name in UNSUPPORTED_CALLBACKS:
            raise UserError(f"trainer.callbacks: {name} does not work here; {UNSUPPORTED_CALLBACKS[name]}")
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


def check_trainer(trainer: Namespace, command: str) -> None:
    """Check the settings of the trainer for a command."""
    for key, least in LEAST.items():
        value = trainer.get(key)
        if value is not None and value < least:
            raise UserError(f"trainer.{key} is {value}; it must be at least {least}")
    if trainer.barebones:
        raise UserError("trainer.barebones leaves out metrics and checkpoints; use dsmr benchmark to measure speed")
    if trainer.profiler == "xla" and find_spec("torch_xla") is None:
        raise UserError("trainer.profiler xla needs the package torch_xla; pip install torch_xla")
    for key in NEEDED[command]:
        if trainer.get(key) == 0:
            raise UserError(f"trainer.{key} is 0; set it to at least 1")
    if command == "fit" and trainer.enable_checkpointing is False and not trainer.fast_dev_run:
        raise UserError(
            "trainer.enable_checkpointing is false, but a run keeps its checkpoints; leave it out, or try a few steps "
            "with trainer.fast_dev_run, which keeps nothing"
        )
    check_duration(trainer.max_time)
    check_accelerator(trainer.accelerator)
    check_devices(trainer.devices, trainer.accelerator)
    check_strategy(trainer.strategy)


def check_duration(given: Any) -> None:
    """Check `trainer.max_time`."""
    parts = given
    if isinstance(given, str):
        match = re.fullmatch(r"(?P<days>\d+):(?P<hours>\d\d):(?P<minutes>\d\d):(?P<seconds>\d\d)", given.strip())
        parts = {name: int(number) for name, number in match.groupdict().items()} if match else {}
    try:
        length = timedelta(**parts) if isinstance(parts, dict) else parts
    except (TypeError, OverflowError):
        length = timedelta(0)
    if length is not None and length <= timedelta(0):
        raise UserError(
            f"trainer.max_time is {given}, which is not a duration; write days:hours:minutes:seconds, such as "
            "00:02:30:00, or {hours: 2, minutes: 30}"
        )


def accelerators() -> list[str]:
    """Return the names of this machine's accelerators in Lightning."""
    return sorted(name for name, entry in AcceleratorRegistry.items() if entry["accelerator"].is_available())


def check_accelerator(given: Any) -> None:
    """Check that this machine has an accelerator."""
    if not isinstance(given, str) or given == "auto":
        return
    here = accelerators()
    if given not in here and not (given == "gpu" and {"cuda", "mps"} & set(here)):
        known = [*AcceleratorRegistry, "gpu", "auto"]
        hint = "" if given in known else nearest(given, known)
        raise UserError(f"trainer.accelerator {given!r}: this machine has {', '.join(here)}{hint}")


def check_devices(devices: Any, accelerator: Any) -> None:
    """Check the number of processes on a CPU; Lightning checks GPUs."""
    is_cpu = accelerator == "cpu" or (accelerator == "auto" and accelerators() == ["cpu"])
    if is_cpu and devices != "auto" and not re.fullmatch(r"0*[1-9]\d*", str(devices).strip()):
        shown = shown_value(devices)
        raise UserError(f"trainer.devices is {shown}; on a CPU it is the number of processes, 1 or more")


def check_strategy(given: Any) -> None:
    """Check the name of a strategy."""
    if not isinstance(given, str) or given == "auto":
        return
    name, known = given.lower(), StrategyRegistry.available_strategies()
    started = [one for one in known if not any(word in one for word in COPIED)]
    if name in started:
        return
    if name in known:
        use = name.partition("_")[0]
        raise UserError(f"trainer.strategy {given}: spawned or forked processes are not supported; use {use}")
    classes = {cls.__name__: cls for cls in subclasses(Strategy) if not inspect.isabstract(cls)}
    cls = classes.get(given.rpartition(".")[2])
    if cls is not None:
        raise UserError(f"trainer.strategy {given} names a class; write {{class_path: {path_of(cls)}}}")
    hint = nearest(name, [*started, *classes]) or f"; known: auto, {', '.join(started)}"
    raise UserError(f"trainer.strategy {given}: no such strategy{hint}")


def check_nodes(trainer: Trainer) -> None:
    """Check that several nodes have an address; without one, Lightning waits half an hour before it fails."""
    strategy = trainer.strategy
    if trainer.num_nodes == 1 or not isinstance(strategy, ParallelStrategy):
        return
    if isinstance(strategy.cluster_environment, LightningEnvironment) and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"trainer.num_nodes is {trainer.num_nodes}, but nothing says where the other nodes are: start with srun "
            "or torchrun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each node"
        )
