"""The folder of a run: which one a command line names, what a new one is called, and what training keeps in it."""

import json
import os
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import WandbLogger

from dsmr import UserError
from dsmr.cli.config_files import config_values, take_option
from dsmr.data.files import atomic_write
from dsmr.model.horizons import format_horizons
from dsmr.results.run_files import (
    CONFIG_FILE,
    LAST_FILE,
    METRICS_FILE,
    SECTION,
    SECTION_FILE,
    find_run_folder,
    read_checkpoint,
)
from dsmr.share import exported
from dsmr.share.loading import find_checkpoint
from dsmr.training.callbacks.last_checkpoint import METRICS_ROWS
from dsmr.training.checkpoint import is_resumable
from dsmr.training.csv_logger import count_rows_before, read_metrics

NAME_VARIABLE = "DSMR_RUN_NAME"
RUN_OPTIONS = ("--resume", "--checkpoint", "--ckpt_path")
OWN_OPTIONS = ("checkpoint", "ckpt_path", "resume", "json", "output", "config", "help_trainer")


@dataclass(frozen=True)
class TrainedRun:
    """The weights that a command starts from."""

    weights: Path  # the checkpoint file, or the weights of an exported model
    folder: Path  # of the run, or else that of the weights
    exported: Path | None = None  # folder of an exported model; None for a run
    horizons: list[int] | None = None  # that the checkpoint was trained with, one per layer
    num_metrics_rows: int = 0  # rows of `metrics.csv` that a resumed run keeps
    global_step: int = 0  # optimizer steps that a resumed run has done


def take_run(command: str, arguments: list[str]) -> tuple[TrainedRun | None, list[str]]:
    """Return the run that `--resume` or `--checkpoint` names, if any, and the other arguments.

    The run's own config comes first, so that all others override it.
    """
    named: dict[str, str | None] = {}
    for option in RUN_OPTIONS:
        named[option], arguments = take_option(arguments, option)
    if sum(value is not None for value in named.values()) > 1:
        raise UserError(f"give only one of {', '.join(RUN_OPTIONS)}")
    resumed, given = named["--resume"], named["--checkpoint"] or named["--ckpt_path"]
    if resumed is None and given is None:
        return None, arguments
    if resumed is not None and take_option(arguments, "--name")[0] is not None:
        raise UserError(
            "--resume continues a run in its own folder; leave out --name, or copy the folder and resume that"
        )
    if resumed is not None and command != "fit":
        raise UserError(f"--resume belongs to dsmr fit; dsmr {command} takes --checkpoint")
    path = find_checkpoint(str(given)) if resumed is None else find_checkpoint(resumed, LAST_FILE)
    if command == "fit" and path.is_dir():
        raise UserError(f"{path} is an exported model, which cannot resume; use dsmr fit --resume RUN")
    if path.is_dir():  # an exported model
        exported.read_description(path)
        weights = path / exported.WEIGHTS
        run = TrainedRun(weights, find_run_folder(weights) or path, exported=path)
    else:
        run = checkpoint_run(command, path)
    if (run.folder / CONFIG_FILE).is_file():
        return run, ["--config", str(run.folder / CONFIG_FILE), *arguments]
    if command == "fit" or not config_values(arguments):
        hint = "" if command == "fit" else f", or give the run's own with --config {CONFIG_FILE}"
        missing = f"{run.weights} has no {CONFIG_FILE} in its folder or the two above"
        raise UserError(f"{missing}; keep it in its run's folder{hint}")
    return run, arguments


def checkpoint_run(command: str, path: Path) -> TrainedRun:
    """Return the run that a checkpoint belongs to."""
    content = read_checkpoint(path)
    if command == "fit" and not is_resumable(content):
        raise UserError(f"{path} holds weights only and cannot resume; use dsmr fit --resume RUN")
    folder = find_run_folder(path)
    run = TrainedRun(path, folder or path.parent, horizons=content[SECTION].get("config", {}).get("horizons"))
    if command != "fit" or folder is None:
        return run
    rows = known_rows(content, folder / METRICS_FILE)
    return replace(run, num_metrics_rows=rows, global_step=int(content.get("global_step", 0)))


def known_rows(checkpoint: dict[str, Any], metrics: Path) -> int:
    """Return the number of rows of `metrics.csv` that a resumed run keeps; format 1 knows it by the step alone."""
    states = checkpoint.get("callbacks", {}).values()
    known = next((int(state[METRICS_ROWS]) for state in states if METRICS_ROWS in state), None)
    if known is None:
        return count_rows_before(metrics, int(checkpoint["global_step"]))
    return min(known, len(read_metrics(metrics)[0]))  # the last row may have been lost with the process


def new_name(model: Namespace) -> str:
    """Name a run by its horizons and the time; processes that were started by another one take over its name."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0 or NAME_VARIABLE not in os.environ:
        os.environ[NAME_VARIABLE] = f"{model_label(model)}-{datetime.now():%Y%m%d-%H%M%S}"
    return os.environ[NAME_VARIABLE]


def model_label(model: Namespace) -> str:
    """Name a model by its horizons, with their rule unless it is the default, or else by its network."""
    network = model.backbone.class_path.rpartition(".")[2]
    if model.horizons is None:
        return network
    horizons = model.horizons if isinstance(model.horizons, str) else model.horizons.class_path.rpartition(".")[2]
    rule = model.backbone.get("init_args", {}).get("rule", "boundary")
    return horizons if rule == "boundary" else f"{horizons}-{rule}"


def continue_wandb(loggers: Any, name: str) -> None:
    """Give a Weights & Biases run an id that the run's config keeps, so that a resumed run continues it."""
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, Namespace) and logger.class_path.endswith("WandbLogger") and not logger.init_args.id:
            known = {"id": uuid4().hex[:12], "name": logger.init_args.name or name, "resume": "allow"}
            logger.init_args.update(Namespace(**known))


class SaveConfig(Callback):
    """Write the settings and the expanded horizons into the run's folder once training has begun."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, folder: Path) -> None:
        self.parser, self.config, self.folder = parser, config.clone(), folder
        for option in OWN_OPTIONS:
            self.config.pop(option, None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `config.yaml` and `run.json`; log both to Weights & Biases."""
        if not trainer.is_global_zero:
            return
        horizons: tuple[int, ...] = pl_module.backbone.horizons  # type: ignore[union-attr,assignment]
        memory = {"horizons": format_horizons(horizons) if horizons else None, "budget": sum(horizons)}
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams({**yaml.safe_load(self.parser.dump(self.config)), "memory": memory})
        section: dict[str, Any] = pl_module.section  # type: ignore[assignment]
        texts = {
            SECTION_FILE: json.dumps(section, indent=2) + "\n",
            CONFIG_FILE: self.parser.dump(self.config, skip_unset=False),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                with atomic_write(self.folder / name) as file:
                    file.write(text.encode())
        except OSError as error:
            raise UserError(f"cannot write {self.folder} ({error.strerror or error}); make room") from error
