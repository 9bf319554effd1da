"""`dsmr judge`: generated pieces compared with real ones."""

from pathlib import Path

from dsmr import UserError
from dsmr.analyze.judging import judge_folders
from dsmr.cli.common_options import JSON, add_options, bar, check_output_folder, write_result
from dsmr.cli.parser import OneLineParser
from dsmr.data.datamodule import MusicData
from dsmr.data.sources import SPLITS

DESCRIPTION = (
    "Compare folders of generated MIDI files, such as those of dsmr generate --prompt validation, with the same "
    "stretch of real pieces: histograms of pitch, velocity, inter-onset time and duration; pitch-class entropy, "
    "polyphony and density; and the longest run of notes copied from a training piece."
)
OPTIONS = {
    "--split": (str, "validation", "Real pieces: train, validation or test split."),
    "--data.path": (str | None, None, "Real pieces, as for dsmr fit (default: MAESTRO)."),
    "--window": (float, 10.0, "Length of the windows of time, in seconds."),
    "--output": (str | None, None, "Folder for table, plot and JSON (default: the first FOLDER)."),
    **JSON,
}


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr judge`."""
    parser = OneLineParser("dsmr judge", DESCRIPTION)
    text = "Folders of MIDI files; the part after each file's prompt is judged."
    parser.add_argument("folders", type=str, nargs="+", help=text)
    add_options(parser, OPTIONS)
    options = parser.parse_args(arguments)
    if options.split not in SPLITS:
        raise UserError(f"--split {options.split} is not one of {', '.join(SPLITS)}")
    if not options.window > 0:
        raise UserError(f"--window is {options.window}; it must be above 0")
    folders = [Path(folder).expanduser() for folder in options.folders]
    target = check_output_folder(Path(options.output).expanduser() if options.output else folders[0])
    data = MusicData(options.data.path)
    data.progress = bar("tokenising")
    judgement = judge_folders(folders, data, options.split, options.window)
    print("\n".join(judgement.write(target)))
    print(f"next: open {target / 'evaluation.md'}")
    write_result(judgement.as_dict(), as_json=options.json)
    return 0
