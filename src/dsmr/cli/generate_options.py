"""Options of `dsmr generate`, and their checks."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from dsmr import UserError
from dsmr.cli.json_output import check_output
from dsmr.cli.parser import OneLineParser
from dsmr.data.sources import SPLITS
from dsmr.generate import check_seed
from dsmr.generate.audio import check_audio
from dsmr.generate.piece_files import numbered
from dsmr.results.plotting import check_plots

SECONDS, MOST_SECONDS = 120.0, 3600.0
SECONDS_OF_MANY = 30.0  # of each prompt and of each continuation, for a folder or a split
NUMBERS: dict[str, tuple[Any, Any, str]] = {
    "prompt_seconds": (
        float | None,
        None,
        f"Seconds of each prompt to use (default: all of a file; {SECONDS_OF_MANY:g} for a folder or a split).",
    ),
    "limit": (int | None, None, "Continue only the first pieces of the folder or split (default: all)."),
    "data.path": (str | None, None, "Data whose split is continued (default: the checkpoint's training data)."),
    "data.validation_stride": (int | None, None, "Use every n-th validation piece (default: as in training)."),
    "seconds": (
        float | None,
        None,
        f"Seconds of new music (default: {SECONDS:g}; {SECONDS_OF_MANY:g} for a folder or a split; with --until_end "
        f"at most {MOST_SECONDS:g}).",
    ),
    "num": (int, 1, "Continuations of each prompt, generated as one batch; the k-th uses seed + k - 1."),
    "seed": (int, 0, "Random seed."),
    "temperature": (float, 1.0, "Divisor of the logits; lower values make the music more predictable."),
    "top_k": (int, 0, "Sample from the k most likely tokens (0: all)."),
    "top_p": (float, 0.98, "Sample from the smallest set of tokens with this total probability (1: all)."),
    "min_p": (float, 0.0, "Ignore tokens below this fraction of the highest probability."),
    "max_note_seconds": (float | None, None, "End notes after this many seconds (default: no limit)."),
    "horizons": (str | None, None, "Horizons to generate with (default: those of training)."),
    "device": (str, "cpu", "Device that runs the network: cpu, cuda, ..."),
    "sound_font": (str | None, None, "General MIDI sound font for --audio (default: search for one)."),
}


def generate_parser() -> ArgumentParser:
    """Options of the command."""
    made = OneLineParser(
        "dsmr generate", "Generate music with a trained model, from nothing or continuing existing pieces."
    )
    made.add_argument("--config", action="config", help="YAML file with options of this command.")
    made.add_argument("--checkpoint", type=str, required=True, help="Run folder, checkpoint file or exported folder.")
    made.add_argument(
        "--output",
        type=str,
        required=True,
        help="MIDI file to write (with --num 2, NAME-1 and NAME-2); a folder if --prompt is a folder or a split.",
    )
    made.add_argument(
        "--prompt",
        type=str | None,
        default=None,
        help="Music to continue: a MIDI file, a folder of MIDI files, or a split of the checkpoint's data (train, "
        "validation or test). Default: start from nothing.",
    )
    for name, (kind, default, text) in NUMBERS.items():
        made.add_argument(f"--{name}", type=kind, default=default, help=text)
    made.add_argument("--until_end", action="store_true", help="Stop where the model ends the piece.")
    made.add_argument("--audio", action="store_true", help="Also render a WAV file with FluidSynth.")
    made.add_argument("--picture", action="store_true", help="Also draw a piano roll, NAME.png.")
    made.add_argument("--json", action="store_true", help="Print the results as JSON on the last line of stdout.")
    return made


def check_options(options: Namespace) -> bool:
    """Check the options and fill in defaults; return True if there are many prompts."""
    prompt = options.prompt
    has_many = prompt is not None and (prompt in SPLITS or Path(prompt).expanduser().is_dir())
    if options.num < 1:
        raise UserError(f"--num is {options.num}; it must be at least 1")
    check_outputs(options, has_many)
    if options.seconds is None:
        options.seconds = MOST_SECONDS if options.until_end else SECONDS_OF_MANY if has_many else SECONDS
    if not options.seconds > 0:
        raise UserError(f"--seconds is {options.seconds:g}; it must be above 0")
    check_seed("--seed", options.seed, options.num)
    if prompt is None and options.prompt_seconds is not None:
        raise UserError("--prompt_seconds says how much of a --prompt is used; give one")
    if options.prompt_seconds is None and has_many:
        options.prompt_seconds = SECONDS_OF_MANY
    if options.limit is not None and not (has_many and options.limit > 0):
        raise UserError("--limit is the number of pieces of a folder or split; give one as --prompt, and at least 1")
    if prompt not in SPLITS and any(value is not None for value in vars(options.data).values()):
        raise UserError(f"--data options choose the pieces of a split; add --prompt {' or '.join(SPLITS)}")
    if options.picture:
        check_plots()
    options.sound_font = check_audio(options.sound_font) if options.audio else None
    return has_many


def check_outputs(options: Namespace, has_many: bool) -> None:
    """Raise UserError if the outputs cannot be written, or would overwrite the prompt."""
    path, is_midi = Path(options.output), Path(options.output).suffix.lower() in (".mid", ".midi")
    if has_many:
        if path.is_file() or (is_midi and not path.is_dir()):
            raise UserError(f"--output {path}: the prompt has many pieces; name a folder")
        if path.is_dir() and Path(options.prompt).is_dir() and path.samefile(options.prompt):
            raise UserError(f"--output {path} is the folder of the prompts, which would be lost; name another folder")
        return
    check_output(options.output)
    if not is_midi:
        raise UserError(f"--output {path}: a MIDI file is written; let its name end with .mid")
    for one in numbered(path, options.num):
        if options.prompt and one.exists() and one.samefile(options.prompt):
            raise UserError(f"--output {one} is the prompt itself, which would be lost; name another file")
