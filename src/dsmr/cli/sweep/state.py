"""Check trials before the first one runs, and keep their state: options, settings, and whether each is done."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from dsmr import UserError
from dsmr.cli.sweep.spec import Sweep, Trial, without_wandb
from dsmr.data.files import atomic_write
from dsmr.results.run_files import BEST_FILE, LAST_FILE

STATE = "trial.json"
BEGUN, DONE, FAILED = "begun", "done", "failed"
IRRELEVANT = {
    "data": ("cache_dir", "num_workers"),
    "trainer": ("logger", "enable_progress_bar", "enable_model_summary", "default_root_dir", "profiler"),
}
DECISIVE = ("seed_everything", "model", "data", "trainer")


def checked(trials: list[Trial]) -> list[Trial]:
    """Parse the options of every trial and return the trials with their fingerprints."""
    return [replace(trial, fingerprint=fingerprint(trial)) for trial in trials]


def check_shared(sweep: Sweep) -> None:
    """Parse the options that all trials share; wandb sets the others."""
    from dsmr.cli.lightning_cli import SizesCLI

    SizesCLI("fit", without_wandb(sweep.options))


def fingerprint(trial: Trial) -> str:
    """Return a hash of all settings that decide a trial's result, config files and defaults included."""
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


def with_values(arguments: list[str]) -> list[str]:
    """Join options that were given as two words, `--key value`."""
    joined: list[str] = []
    for word in arguments:
        if word.startswith("--") or not joined:
            joined.append(word)
        else:
            joined[-1] += f" {word}"
    return joined


def check_same(trial: Trial, run: Path) -> None:
    """Refuse a folder whose trial was started with other options or other contents of its config files."""
    state = read_state(run)
    if state is None:
        if any((run / name).is_file() for name in (LAST_FILE, BEST_FILE)):
            raise UserError(f"{run} holds a run that no sweep started; choose another --root, or move it away")
        return
    before, now = state["arguments"], list(trial.arguments)
    if before != now:
        here, there = with_values(now), with_values(before)
        changed = [one for one in here if one not in there] or [one for one in there if one not in here] or here
        raise UserError(
            f"{run} was started with other options ({', '.join(changed)}); choose another --root, or delete it"
        )
    is_kept = state["status"] != FAILED or (run / LAST_FILE).is_file()  # other failed trials start over
    known = state.get("fingerprint")
    if is_kept and None not in (known, trial.fingerprint) and known != trial.fingerprint:
        raise UserError(
            f"{run} was started with other settings, in a config file or a default that has changed since; put them "
            "back, choose another --root, or delete it"
        )


def read_state(run: Path) -> dict[str, Any] | None:
    """Read the state of a trial; None if it has not started."""
    path = run / STATE
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert {"status", "arguments"} <= state.keys()
    except (ValueError, AssertionError) as error:
        raise UserError(f"{path} is corrupt ({error}); delete {run} to run the trial again") from error
    return state


def write_state(run: Path, trial: Trial, status: str, message: str = "") -> None:
    """Write the state of a trial."""
    run.mkdir(parents=True, exist_ok=True)
    known = {"arguments": list(trial.arguments), "fingerprint": trial.fingerprint, "message": message}
    state = {"status": status, "values": trial.values, **known}
    with atomic_write(run / STATE) as file:
        file.write((json.dumps(state, indent=2) + "\n").encode())
