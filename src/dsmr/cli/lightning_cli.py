"""`DsmrCLI`: LightningCLI with run folders, shipped configs and errors of one line."""

import argparse
import json
import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from dsmr import UserError
from dsmr.cli import COMMANDS
from dsmr.cli.common_options import JSON, Options, add_options
from dsmr.cli.config_files import FOLDER
from dsmr.cli.given_settings import level_given, options_of
from dsmr.cli.help_format import FitHelp, RunHelp
from dsmr.cli.library_errors import errors_of_settings
from dsmr.cli.parser import OneLineParser, underscored
from dsmr.cli.refusals import FILLED_BY_MODULE
from dsmr.cli.run_checks import check_folder, check_resumed, check_seed, check_settings
from dsmr.cli.run_folder import SaveConfig, continue_wandb, new_name, take_run
from dsmr.cli.trainer_settings import Level, check_nodes, check_trainer, settle_root, settle_trainer
from dsmr.cli.yaml_values import load_yaml, plain_values
from dsmr.data.datamodule import MusicData
from dsmr.generate.samples import Samples
from dsmr.model.backbone import build_on_meta
from dsmr.model.horizons import format_horizons
from dsmr.results.run_files import BEST_FILE, CONFIG_FILE, LAST_FILE
from dsmr.training.callbacks import BestCheckpoint, EpochTime, LastCheckpoint, LostProcess, PeakMemory, Throughput
from dsmr.training.checkpoint import AtomicCheckpointIO
from dsmr.training.csv_logger import MetricsLogger
from dsmr.training.module import RecurrentLM

OPTIONS: Options = {
    "--name": (str | None, None, "Name of the run, by default its horizons and the time."),
    "--root": (str, "runs", "Folder of all runs."),
    "--resume": (str | None, None, "Run to resume."),
    "--checkpoint": (str | None, None, "Run (its best checkpoint), checkpoint file or exported model."),
    "--save_every_n_steps": (int, 500, "Save last.ckpt after this number of optimizer steps."),
    "--save_every_minutes": (float, 10.0, "Save last.ckpt at least this often."),
    "--sample_every_n_steps": (int, 5000, "Generate a sample after this number of steps; 0: none."),
}
PIECES = {"--pieces": (str | None, None, "CSV file for the results of each piece, by default in the run's folder.")}
RESULTS = {**JSON, "--output": (str | None, None, "File for the results as JSON.")}
CLASS_HELP = (
    "--model.backbone.help CLASS lists the options of a network. The same holds for model.horizons, model.optimizer, "
    "model.lr_scheduler, data.recall and data.windows. Every option may also be given in a configuration file."
)
QUIET = (
    ".*instantiate_classes.*",  # Lightning calls what jsonargparse deprecates
    ".*LeafSpec.*",  # Lightning builds what torch deprecates
    ".*LightningCLI's args parameter.*",  # the command is removed before Lightning parses the rest
    ".*does not have many workers.*",  # reading a batch takes microseconds
    ".*exists and is not empty.*",  # a resumed run
    ".*your dataloader is not resumable.*",  # the datamodule is
    ".*callbacks used to create the checkpoint.*",  # those of training, when last.ckpt is only evaluated
    ".*`max_epochs` was not set.*",  # settle_trainer decides what ends a run
    ".*sync_dist=True.*",  # all processes log the same
)


class CommandParser(OneLineParser, LightningArgumentParser):
    """`OneLineParser` with the methods by which LightningCLI adds classes."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Leave out the backbone's arguments that the module fills in: horizons are set at `--model.horizons` only."""
        filled = {f"backbone.init_args.{name}" for name in FILLED_BY_MODULE}
        added: list[str] = super().add_class_arguments(*args, **kwargs | {"skip": {*kwargs.get("skip", ()), *filled}})
        return added


class TrainerHelp(argparse.Action):
    """Print the options of Lightning's Trainer, with the defaults of base.yaml, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print and exit."""
        trainer_parser = CommandParser(parser.prog, "Options of Lightning's Trainer.")
        trainer_parser.add_lightning_class_args(Trainer, "trainer")
        base = plain_values(load_yaml((FOLDER / "base.yaml").read_text(encoding="utf-8")))["trainer"]
        trainer_parser.set_defaults({f"trainer.{key}": value for key, value in base.items()})
        trainer_parser.print_help()
        parser.exit()


class DsmrCLI(LightningCLI):
    """LightningCLI for `RecurrentLM` and `MusicData`. It builds datamodule, model and trainer, and runs nothing."""

    options: ClassVar[Options] = {}  # further options of the command

    def __init__(self, command: str, arguments: list[str]) -> None:
        quieten()
        self.command = command
        self.folder: Path  # of the run
        self.trained, arguments = take_run(command, underscored(arguments))
        self.checkpoint = self.trained.weights if self.trained else None
        self.exported = self.trained.exported if self.trained else None
        super().__init__(
            RecurrentLM,
            MusicData,
            args=arguments,
            run=False,
            parser_class=CommandParser,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            parser_kwargs={
                "prog": f"dsmr {command}",
                "default_config_files": [str(FOLDER / "base.yaml")],
                "description": f"dsmr {command}: {COMMANDS[command][1]}.",
                "epilog": CLASS_HELP,
                "formatter_class": FitHelp if command == "fit" else RunHelp,
            },
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of data and model before those of the trainer."""
        for key, cls in (("data", MusicData), ("model", RecurrentLM), ("trainer", Trainer)):
            parser.add_lightning_class_args(cls, key)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run; all commands accept those of training, since a run's config has them."""
        pieces = PIECES if self.command in ("validate", "test") else {}
        add_options(parser, {**OPTIONS, **pieces, **RESULTS})
        text = "Print the options of Lightning's Trainer and exit."
        parser.add_argument("--help-trainer", "--help_trainer", action=TrainerHelp, nargs=0, help=text)
        add_options(parser, self.options)
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
        parser.link_arguments("data.segment_length", "model.segment_length")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and check the seed before Lightning uses it."""
        super().parse_arguments(parser, args)
        check_seed(self.config.seed_everything)

    def before_instantiate_classes(self) -> None:
        """Settle settings that depend on each other, and the run's folder."""
        settings = self.config
        check_settings(settings)
        assert isinstance(self.parser, CommandParser)
        assert self.parser.given_arguments is not None
        level = partial(level_given, self.parser.given_arguments, options_of(self.parser))
        settle_trainer(settings.trainer, self.command, level)
        if settings.data.seed is None and isinstance(settings.seed_everything, int):
            settings.data.seed = settings.seed_everything
        if self.trained is None:
            self._settle_new_run(settings, level)
            return
        self.folder = self.trained.folder
        self._keep_horizons(settings.model)
        if self.command == "fit":
            check_resumed(self.folder / CONFIG_FILE, settings.model)

    def _settle_new_run(self, settings: Namespace, level: Level) -> None:
        settle_root(settings, level)
        if settings.name is None:
            settings.name = new_name(settings.model)
        self.folder = Path(settings.root) / settings.name
        if self.command == "fit" and not settings.trainer.fast_dev_run:
            if any((self.folder / name).exists() for name in (LAST_FILE, BEST_FILE)):
                both = f"choose another --name, or resume with --resume {self.folder}"
                raise UserError(f"{self.folder} already holds a run; {both}")
            check_folder(self.folder, f"--root {settings.root}")
        continue_wandb(settings.trainer.logger, settings.name)

    def _keep_horizons(self, model: Namespace) -> None:
        """Replace the run's own schedule by the horizons that it had then; the class may return others by now."""
        assert self.trained is not None
        config = self.folder / CONFIG_FILE
        if self.trained.horizons and isinstance(model.horizons, Namespace) and config.is_file():
            run = plain_values(load_yaml(config.read_text(encoding="utf-8")))
            if json.loads(json.dumps(model.horizons.as_dict())) == run["model"]["horizons"]:
                model.horizons = format_horizons(self.trained.horizons)

    def instantiate_classes(self) -> None:
        """Build datamodule, model and trainer."""
        check_trainer(self.config.trainer, self.command)
        with errors_of_settings(self.config):
            super().instantiate_classes()
        check_nodes(self.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the run's logger and checkpoints."""
        settings = self.config_init.trainer
        callbacks = list[Callback]()
        if self.command != "fit" and settings.callbacks:  # nothing is saved
            settings.callbacks = [one for one in settings.callbacks if not isinstance(one, Checkpoint)]
        has_bar = any(isinstance(callback, ProgressBar) for callback in settings.callbacks or [])
        if settings.enable_progress_bar is not False and not has_bar:
            callbacks.append(TQDMProgressBar(refresh_rate=10))
        is_run = self.command == "fit" and not settings.fast_dev_run
        if is_run:
            for one in settings.callbacks or []:
                if isinstance(one, ModelCheckpoint) and one.dirpath is None:  # whatever the logger is
                    one.dirpath = str(self.folder / "checkpoints")
            # before the user's callbacks, which save its score; ours come after all others
            settings.callbacks = [BestCheckpoint(self.folder), *(settings.callbacks or [])]
            callbacks += [
                SaveConfig(self.parser, self.config, self.folder),
                LostProcess(self.folder),
                EpochTime(),
                clock := Throughput(),
                PeakMemory(),
                Samples(self.folder, self.config.sample_every_n_steps, clock=clock),
                LastCheckpoint(self.folder, self.config.save_every_n_steps, self.config.save_every_minutes),
            ]
        if settings.logger is None:
            num_rows = self.trained.num_metrics_rows if self.trained else 0
            kwargs["logger"] = MetricsLogger(self.folder, num_rows) if is_run else False
        self.trainer_defaults["callbacks"] = callbacks
        plugins = settings.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)


class SizesCLI(DsmrCLI):
    """`DsmrCLI` that builds the network without weights and no trainer, for commands that only need its sizes."""

    def instantiate_classes(self) -> None:
        """Build datamodule and network, on no device."""
        with errors_of_settings(self.config):
            self.config_init = build_on_meta(lambda: self.parser.instantiate_classes(self.config))
        self.datamodule, self.model = self.config_init.data, self.config_init.model


def quieten() -> None:
    """Silence Lightning's remarks on itself and warnings that a user cannot act on."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
