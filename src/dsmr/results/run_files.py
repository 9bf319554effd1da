"""The files of a run's folder.

    RUN/config.yaml   all settings
        run.json      the section `dsmr` of its checkpoints, so that reports need neither weights nor a user's classes
        metrics.csv   logged metrics
        pieces.csv    results by piece of the best validation
        last.ckpt     everything that a resumed run needs, see `dsmr.training.checkpoint`
        best.ckpt     the weights with the best validation; cannot resume

Checkpoints are read with `weights_only=True`: tensors, numbers and strings.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dsmr import UserError

FORMAT_VERSION = 2
SECTION = "dsmr"
BEST_FILE, LAST_FILE = "best.ckpt", "last.ckpt"
CONFIG_FILE, METRICS_FILE, SECTION_FILE = "config.yaml", "metrics.csv", "run.json"


def read_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint written by dsmr; `mmap` leaves the tensors on the disk until they are used.

    UserError if the file is damaged, contains code, or was not written by dsmr.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises almost anything for a file that is not its own
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{path} cannot be loaded safely as a checkpoint: {reason}") from error
    if not isinstance(content, dict) or SECTION not in content:
        raise UserError(f"{path} was not written by dsmr; give a run folder or one of its checkpoints")
    check_format_version(content[SECTION], path)
    return content


def read_run_section(folder: Path) -> dict[str, Any] | None:
    """Read a run's description of its network from `run.json`, or from a checkpoint for runs of earlier versions.

    It is as of `dsmr.share.description`; None if the run has neither file. Nothing is imported, and no weights are
    read into memory.
    """
    if (folder / SECTION_FILE).is_file():
        section = json.loads((folder / SECTION_FILE).read_text(encoding="utf-8"))
        if not isinstance(section, dict):
            raise UserError(f"{SECTION_FILE} does not describe a run")
        return section
    for path in (folder / BEST_FILE, folder / LAST_FILE):
        if path.is_file():
            with suppress(ValueError):  # a damaged checkpoint does not affect the run's metrics
                section = read_checkpoint(path, mmap=True)[SECTION]
                return section if isinstance(section, dict) else None
    return None


def find_run_folder(checkpoint: Path) -> Path | None:
    """Return the folder of a checkpoint's run, which contains its `config.yaml`; None if there is none.

    Lightning's own ModelCheckpoint writes to RUN/checkpoints, or to a version's folder above that.
    """
    run_files = (METRICS_FILE, LAST_FILE, BEST_FILE)
    for above in ("", "..", "../.."):
        folder = Path(os.path.normpath(checkpoint.parent / above))
        is_run = not above or any((folder / name).is_file() for name in run_files)
        if is_run and (folder / CONFIG_FILE).is_file():
            return folder
    return None


def check_format_version(section: dict[str, Any], path: Path) -> None:
    """Raise UserError for files written by a newer version."""
    written = section["format_version"]
    if written > FORMAT_VERSION:
        raise UserError(f"{path} has format {written}, this version reads up to {FORMAT_VERSION}; update dsmr")
