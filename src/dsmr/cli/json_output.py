"""Write results as JSON: to a file, and to the last line of stdout."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from dsmr import UserError


def check_output(given: str | None, option: str = "--output") -> Path | None:
    """Return the path of a result file, and check before any work that it can be written."""
    if given is None:
        return None
    path = Path(given)
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{option} {path} cannot be written: no right to write there")
    return path


def write_result(result: dict[str, Any], *, as_json: bool, output: Path | None) -> None:
    """Write a result to a file, and as one JSON document to the last line of stdout, if asked for."""
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
