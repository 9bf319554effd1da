"""Commands share this: options and their checks, progress bars, and results as JSON."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from tqdm.auto import tqdm

from dsmr import UserError

Options = Mapping[str, tuple[Any, Any, str]]  # options, each with its type (None for a flag), default and help
JSON: Options = {"--json": (None, False, "Print the results as JSON on the last line of stdout.")}
_drawn: list[tqdm] = []


def add_options(parser: ArgumentParser, options: Options) -> None:
    """Add options to a parser."""
    for name, (kind, default, text) in options.items():
        how = {"action": "store_true"} if kind is None else {"type": kind, "default": default}
        parser.add_argument(name, **how, help=text)


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


def check_output_folder(folder: Path) -> Path:
    """Return a folder for results, unless it is a file."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; name a folder")
    return folder


def check_device(name: str) -> torch.device:
    """Return the named device; raise UserError, naming those of this machine, if it has no such device."""
    kind, _, index = name.partition(":")
    here = devices_here()
    if kind not in here or not (index == "" or (index.isdecimal() and int(index) < here[kind])):
        known = [one for kind, num in here.items() for one in (kind, *(f"{kind}:{i}" for i in range(1, num)))]
        raise UserError(f"--device {name}: this machine has {', '.join(known)}")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error


def devices_here() -> dict[str, int]:
    """Return the number of devices of each kind that torch finds."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return {"cpu": 1} | ({} if found is None else {found.type: torch.accelerator.device_count()})


def close_bars() -> None:
    """Close bars that an error left open, so that a message begins on a new line."""
    while _drawn:
        _drawn.pop().close()


def bar(title: str) -> Callable[[int, int], None]:
    """Return a progress callback, which draws its bar at the first call."""
    drawn: tqdm | None = None

    def advance(done: int, total: int) -> None:
        nonlocal drawn
        if drawn is None:
            drawn = tqdm(total=total, desc=title, unit="piece")
            _drawn.append(drawn)
        drawn.update(done - drawn.n)
        if done == total:
            close_bars()

    return advance


def write_result(result: dict[str, Any], *, as_json: bool, output: Path | None = None) -> None:
    """Write a result to a file, and as one JSON document to the last line of stdout, if asked for."""
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
