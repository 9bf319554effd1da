"""The parser of commands that take the settings of training, and its help."""

import argparse
import re
from typing import Any

from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from dsmr.cli.config_files import FOLDER
from dsmr.cli.help_format import ShortHelp
from dsmr.cli.parser import OneLineParser
from dsmr.cli.refusals import FILLED_BY_MODULE
from dsmr.cli.yaml_values import load_yaml, plain_values

CLASS_HELP = (
    "--model.backbone.help CLASS lists the options of a network. The same holds for model.horizons, model.optimizer, "
    "model.lr_scheduler, data.recall and data.windows. Every option may also be given in a configuration file."
)


class CommandParser(OneLineParser, LightningArgumentParser):
    """`OneLineParser` with the methods by which LightningCLI adds classes."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Leave out the backbone's arguments that the module fills in: horizons are set at `--model.horizons` only."""
        filled = {f"backbone.init_args.{name}" for name in FILLED_BY_MODULE}
        added: list[str] = super().add_class_arguments(*args, **kwargs | {"skip": {*kwargs.get("skip", ()), *filled}})
        return added


class FitHelp(ShortHelp):
    """Help without the options of Lightning's Trainer."""

    hidden = re.compile(r"trainer\b")


class RunHelp(ShortHelp):
    """Help without the options of training, which other commands only read from a run's config."""

    hidden = re.compile(r"trainer\b|(name|root|resume|save_every_n_steps|save_every_minutes|sample_every_n_steps)$")


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
