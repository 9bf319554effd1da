"""Checks of a run's name, folder, seed and schedule. Each raises `UserError`, naming the option."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jsonargparse import Namespace

from dsmr import UserError
from dsmr.cli.type_words import find_class
from dsmr.cli.yaml_values import load_yaml
from dsmr.model import Schedule
from dsmr.share.description import import_class

CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
MOST_SEED = 2**32 - 1


def check_settings(settings: Namespace) -> None:
    """Check what can be checked before anything is built."""
    if settings.resume is not None or settings.checkpoint is not None:
        raise UserError("resume and checkpoint belong on the command line, not in a config file; take them out")
    name = settings.name
    if name is not None and (name in ("", ".", "..") or "/" in name or os.sep in name or name != name.strip()):
        raise UserError(f"--name {name!r} must be the name of one folder; --root sets the folder that it is in")
    horizons = settings.model.horizons
    # jsonargparse takes the class path of a schedule for a string if it cannot be imported
    if isinstance(horizons, str) and CLASS_PATH.fullmatch(horizons):
        found = import_class(horizons, f"model.horizons {horizons}:")
        if not (isinstance(found, type) and issubclass(found, Schedule)):
            reason = "it does not derive from dsmr.model.Schedule"
            raise UserError(f"model.horizons {horizons} is not a schedule: {reason}")


def check_seed(seed: bool | int | None) -> None:
    """Check that NumPy accepts a seed."""
    if not isinstance(seed, bool) and seed is not None and not 0 <= seed <= MOST_SEED:
        raise UserError(f"seed_everything is {seed}; it must be from 0 to {MOST_SEED}")


def check_resumed(config: Path, model: Namespace) -> None:
    """Check that a resumed run keeps the optimizer and scheduler of its config, whose state the checkpoint holds."""
    before = (load_yaml(config.read_text(encoding="utf-8")) or {}).get("model") or {}
    for key in ("optimizer", "lr_scheduler"):
        spec, now = before.get(key), model[key]
        was = spec.get("class_path") if isinstance(spec, dict) else spec
        if was and was != now.class_path and find_class(was, ()) is not find_class(now.class_path, ()):
            raise UserError(
                f"model.{key} is now {now.class_path}, but the run was trained with {was}, of which the checkpoint "
                f"holds the state; leave model.{key} as it was, or begin a new run"
            )


def check_folder(folder: Path, option: str) -> None:
    """Check that a run's folder can be made, and leave nothing behind."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: the folder {folder} cannot be made ({error.strerror}); name another") from error
    finally:
        remove_empty(missing)


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Remove a folder, and new folders above it, that an error has left empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except Exception:
        remove_empty(missing)
        raise


def remove_empty(folders: list[Path]) -> None:
    """Remove those folders that are empty, innermost first."""
    for path in folders:
        with suppress(OSError):
            path.rmdir()
