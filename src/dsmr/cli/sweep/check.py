"""Checks before the first trial: parse the options of every trial, and hash the settings that they lead to."""

import hashlib
import json
from dataclasses import replace

import yaml

from dsmr import UserError
from dsmr.cli.sweep.spec import Sweep, Trial, without_wandb

IRRELEVANT = {
    "data": ("cache_dir", "num_workers"),
    "trainer": ("logger", "enable_progress_bar", "enable_model_summary", "default_root_dir", "profiler"),
}
DECISIVE = ("seed_everything", "model", "data", "trainer")


def checked(trials: list[Trial]) -> list[Trial]:
    """Parse the options of every trial and return the trials with their fingerprints.

    Raises:
        UserError: an option is wrong; with the trial's name.
    """
    return [replace(trial, fingerprint=fingerprint(trial)) for trial in trials]


def check_shared(sweep: Sweep) -> None:
    """Parse the options that all trials share; wandb sets the others.

    Raises:
        UserError: an option is wrong.
    """
    from dsmr.cli.lightning_cli import SizesCLI

    SizesCLI("fit", without_wandb(sweep.options))


def fingerprint(trial: Trial) -> str:
    """Return a hash of all settings that decide a trial's result, config files and defaults included.

    Raises:
        UserError: an option is wrong.
    """
    from dsmr.cli.lightning_cli import SizesCLI

    try:
        cli = SizesCLI("fit", list(trial.arguments))
    except ValueError as error:
        raise UserError(f"trial {trial.name}: {error}") from error
    settings = yaml.safe_load(cli.parser.dump(cli.config))
    kept = {section: settings[section] for section in DECISIVE}
    for section, names in IRRELEVANT.items():
        kept[section] = {name: value for name, value in kept[section].items() if name not in names}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
