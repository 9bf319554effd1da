"""The program `dsmr`: one command each for preparing data, training, evaluating and generating.

Commands are imported when they are called, so that `dsmr --help` is fast. An error of the user is one line on
stderr that says what to do, with exit status 2; `DSMR_DEBUG=1` prints the traceback as well.
"""

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from dsmr import UserError

COMMANDS = {
    "prepare": ("dsmr.cli.prepare_command", "tokenize MIDI files into a token store"),
    "fit": ("dsmr.cli.fit_command", "train a model, or resume a run"),
    "validate": ("dsmr.cli.fit_command", "evaluate a trained model on the validation split"),
    "test": ("dsmr.cli.fit_command", "evaluate a trained model on the test split"),
    "generate": ("dsmr.cli.generate_command", "generate new pieces, or continue existing ones"),
    "judge": ("dsmr.cli.judge_command", "compare generated pieces with real ones"),
    "analyze": ("dsmr.cli.analyze_command", "measure what a trained model uses its memory for"),
    "estimate": ("dsmr.cli.estimate_command", "estimate parameters, memory, speed and cost without training"),
    "benchmark": ("dsmr.cli.benchmark_command", "measure speed and memory of schedules, baselines and peers"),
    "sweep": ("dsmr.cli.sweep", "run many trials of one sweep file"),
    "report": ("dsmr.cli.report_command", "summarize runs and benchmarks in tables and plots"),
    "export": ("dsmr.cli.export_command", "export a trained model to share it"),
}
REMOVED = {"evaluate": "dsmr judge", "predict": "dsmr generate --prompt validation"}
"""Commands of earlier versions, and what replaces them."""
USAGE = """usage: dsmr COMMAND [options]

Depth-Structured Music Recurrence: train and use language models of whole piano pieces.

commands:
{}

dsmr COMMAND --help lists the options of a command. Start with: dsmr prepare"""
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return its exit status: 1 after an interruption, 2 after an error of the user."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        print(USAGE.format("\n".join(f"  {name:<11}{text}" for name, (_, text) in COMMANDS.items())))
        return 0
    if given[0] == "--version":
        from importlib.metadata import version

        print(f"dsmr {version('dsmr')}")
        return 0
    if given[0] in REMOVED:
        return fail(f"dsmr {given[0]} was removed; use {REMOVED[given[0]]}")
    if given[0] not in COMMANDS:
        return fail(f"unknown command {given[0]!r}{nearest(given[0], COMMANDS)}; known: {', '.join(COMMANDS)}")
    # settings may name classes in the current folder, as in `python main.py`; installed packages come first
    if not sys.flags.safe_path and not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))
    try:
        run: Callable[[str, list[str]], int] = importlib.import_module(COMMANDS[given[0]][0]).run
        return run(given[0], given[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        message = user_message(error)
        if message is None or os.environ.get("DSMR_DEBUG"):
            raise
        return fail(message)


def user_message(error: Exception) -> str | None:
    """Return what a user can do about an error, or None if it is a bug that needs its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return f"cannot write {error.filename or 'a file'} ({error.strerror}): make room, or choose another folder"
    if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] != "dsmr":
        return f"{error}; pip install it" if error.name else str(error)
    # by their names, since not every command imports these packages
    kind, package = type(error).__name__, type(error).__module__
    if kind == "OutOfMemoryError" and package.startswith("torch"):
        return f"{str(error).partition('. ')[0]}: lower data.num_lanes or the horizons; dsmr estimate shows what fits"
    if kind == "MisconfigurationException" or package.startswith("wandb.errors"):
        return str(error)
    return None


def fail(message: str) -> int:
    """Print an error in one line, and return the exit status for an error of the user."""
    if "dsmr.cli.common_options" in sys.modules:
        sys.modules["dsmr.cli.common_options"].close_bars()
    print(f"dsmr: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def nearest(word: str, known: Iterable[object], cutoff: float = 0.5) -> str:
    """Return `; did you mean ...?` with the most similar known word, ignoring case, or an empty string."""
    names = {str(name).lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(names), n=1, cutoff=cutoff)
    return f"; did you mean {names[close[0]]}?" if close else ""
