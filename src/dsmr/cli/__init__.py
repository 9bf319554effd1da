"""The program `dsmr`: one command each for preparing, training, evaluating and generating.

Commands are imported when they are called, so that help is quick. What people read goes to the screen; a mistake
of the user's is one line that says what to do, with exit status 2. `DSMR_DEBUG=1` shows the whole traceback.
"""

import difflib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

COMMANDS = {
    "prepare": ("dsmr.cli.prepare_command", "MIDI into the token store"),
    "fit": ("dsmr.cli.fit_command", "train a model"),
    "validate": ("dsmr.cli.fit_command", "perplexity of a trained model on whole validation pieces"),
    "test": ("dsmr.cli.fit_command", "the same on the test split"),
    "generate": (
        "dsmr.cli.generate_command",
        "music from a trained model: new pieces, or continuations",
    ),
    "predict": ("dsmr.cli.fit_command", "continuations of validation pieces, many at once"),
    "judge": ("dsmr.cli.judge_command", "compare folders of generated pieces with real ones"),
    "export": ("dsmr.cli.export_command", "a trained model as a folder to hand on"),
    "estimate": (
        "dsmr.cli.estimate_command",
        "parameters, memory, speed and cost, without training",
    ),
    "sweep": ("dsmr.cli.sweep", "many trials from one file: schedules, budgets, seeds"),
    "analyze": (
        "dsmr.cli.analyze_command",
        "where layers look, what memory is worth, what it hears in a piece",
    ),
    "report": ("dsmr.cli.report_command", "tables and pictures of runs and benchmarks"),
    "benchmark": ("dsmr.cli.benchmark_command", "speed and memory of schedules, baselines and peers"),
}
RENAMED = {"evaluate": "dsmr judge"}
"""What replaces a command of earlier versions."""
DEBUG_VARIABLE = "DSMR_DEBUG"
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command and its options; None means the program's own.

    Returns:
        the exit status: 0, 1 after an interruption, 2 after a mistake of the user's.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0
    if given[0] == "--version":
        from importlib.metadata import version

        print(f"dsmr {version('dsmr')}")
        return 0
    if given[0] in RENAMED:
        return fail(f"dsmr {given[0]} is now {RENAMED[given[0]]}")
    if given[0] not in COMMANDS:
        return fail(f"no command {given[0]!r}{nearest(given[0], COMMANDS)}; known: {', '.join(COMMANDS)}")
    see_current_folder()
    try:
        run: Callable[[str, list[str]], int] = importlib.import_module(COMMANDS[given[0]][0]).run
        return run(given[0], given[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE) or not is_mistake(error):
            raise
        return fail(described(error))


def see_current_folder() -> None:
    """Let classes be named that stand in the current folder, as `python main.py` does; installed ones come first."""
    if not sys.flags.safe_path and not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))


def usage() -> str:
    """What `dsmr --help` prints."""
    rows = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dsmr COMMAND [--config FILE_OR_NAME ...] [options]",
            "",
            "Depth-Structured Music Recurrence: whole piano performances, a memory horizon per layer.",
            "",
            *rows,
            "",
            "dsmr COMMAND --help lists its options. Start with: dsmr prepare",
        ]
    )


def is_mistake(error: Exception) -> bool:
    """Whether an error is for a user.

    A ValueError that our own code raised, a library's word on its settings, a package that is not installed, a GPU
    that is full, or a disk on which nothing can be written.
    """
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return True
    if is_missing_package(error) or is_out_of_memory(error):
        return True
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if isinstance(error, MisconfigurationException) or type(error).__module__.startswith("wandb.errors"):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_globals.get("__name__", "")
    return isinstance(error, ValueError) and raised_in.partition(".")[0] == "dsmr"


def described(error: Exception) -> str:
    """What to do about an error that is for a user."""
    if isinstance(error, OSError):
        return unwritten(error)
    if is_missing_package(error) and getattr(error, "name", None):
        return f"{error}; pip install it"
    if is_out_of_memory(error):
        return f"{str(error).partition('. ')[0]}: lower data.num_lanes, or the horizons; dsmr estimate tells what fits"
    return str(error)


def is_missing_package(error: Exception) -> bool:
    """Whether a package is missing that is not this one."""
    return isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] != "dsmr"


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU is full; asked without torch, which not every command imports."""
    return type(error).__name__ == "OutOfMemoryError" and type(error).__module__.partition(".")[0] == "torch"


def unwritten(error: OSError) -> str:
    """What to do where a system does not let us write."""
    return f"cannot write {error.filename or 'a file'} ({error.strerror}): make room, or choose another folder"


def fail(message: str) -> int:
    """Print one line and give the exit status of a mistake."""
    if "dsmr.cli.progress" in sys.modules:
        sys.modules["dsmr.cli.progress"].close_bars()
    print(f"dsmr: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def nearest(word: str, known: Iterable[object], cutoff: float = 0.5) -> str:
    """`; did you mean ...?` with the nearest known word, or nothing; upper and lower case are alike."""
    names = {str(name).lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(names), n=1, cutoff=cutoff)
    return f"; did you mean {names[close[0]]}?" if close else ""
