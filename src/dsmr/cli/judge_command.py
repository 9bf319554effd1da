"""`dsmr judge`: generated pieces compared with real ones."""

from pathlib import Path

from jsonargparse import ArgumentParser

from dsmr import UserError
from dsmr.analyze.judging import judge_folders
from dsmr.cli.json_output import write_result
from dsmr.cli.parser import OneLineParser
from dsmr.cli.progress import bar
from dsmr.data.datamodule import MusicData
from dsmr.data.sources import SPLITS


def parser() -> ArgumentParser:
    """Options of the command."""
    made = OneLineParser(
        "dsmr judge",
        "Compare folders of generated MIDI files, such as those of dsmr generate --prompt validation, with the same "
        "stretch of real pieces: histograms of pitch, velocity, inter-onset time and duration; pitch-class entropy, "
        "polyphony and density; and the longest run of notes copied from a training piece.",
    )
    made.add_argument(
        "folders", type=str, nargs="+", help="Folders of MIDI files; the part after each file's prompt is judged."
    )
    made.add_argument("--split", type=str, default="validation", help="Real pieces: train, validation or test split.")
    made.add_argument(
        "--data.path", type=str | None, default=None, help="Real pieces, as for dsmr fit (default: MAESTRO)."
    )
    made.add_argument("--window", type=float, default=10.0, help="Length of the windows of time, in seconds.")
    made.add_argument(
        "--output", type=str | None, default=None, help="Folder for table, plot and JSON (default: the first FOLDER)."
    )
    made.add_argument("--json", action="store_true", help="Print the results as JSON on the last line of stdout.")
    return made


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr judge`."""
    options = parser().parse_args(arguments)
    if options.split not in SPLITS:
        raise UserError(f"--split {options.split} is not one of {', '.join(SPLITS)}")
    if not options.window > 0:
        raise UserError(f"--window is {options.window}; it must be above 0")
    folders = [Path(folder).expanduser() for folder in options.folders]
    target = Path(options.output).expanduser() if options.output else folders[0]
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {target} is a file; name a folder")
    data = MusicData(options.data.path)
    data.progress = bar("tokenising")
    judgement = judge_folders(folders, data, options.split, options.window)
    print("\n".join(judgement.write(target)))
    print(f"next: open {target / 'evaluation.md'}")
    write_result(judgement.as_dict(), as_json=options.json, output=None)
    return 0
