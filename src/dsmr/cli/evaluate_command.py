"""`dsmr evaluate`: generated pieces against a reference split."""

import json
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from dsmr import UserError
from dsmr.analyze.copying import training_pitches
from dsmr.analyze.excerpts import read_generated, read_reference
from dsmr.analyze.music_comparison import FEWEST, NUM_DRAWS, evaluate, table
from dsmr.cli.json_output import write_result
from dsmr.cli.options import OneLine, underscored
from dsmr.cli.progress import bar
from dsmr.data.datamodule import MusicData
from dsmr.data.files import replacing
from dsmr.data.sources import SPLITS
from dsmr.data.tokenizer import Performance

EXPLANATION = (
    "OA is the overlap area of two histograms (1: alike, 0: nothing in common), KL the Kullback-Leibler divergence "
    "from the reference's in nats. A run is the longest sequence of pitches that a piece shares with any training "
    "piece, the median over pieces; the reference's own shows what is common property."
)
FLOOR = (
    "OA and KL depend on the number of excerpts. Below each set is its floor: the same number of real excerpts, drawn "
    f"from the reference at random, {NUM_DRAWS:,} times, and compared with the rest of it; the mean and, in "
    "brackets, the range of 95 % of the draws. The set is compared with the same rests. Within the range, its "
    "histogram cannot be told from that of real excerpts; real music from elsewhere, such as another split, may lie "
    "outside. A set of more than half the reference is thinned to half of it at random, anew in each draw. "
    "Continuations of one prompt are more alike than as many pieces: a fair set has one of each."
)


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr evaluate`."""
    options = parser().parse_args(underscored(arguments))
    if options.split not in SPLITS:
        raise UserError(f"--split {options.split} is not one of {', '.join(SPLITS)}")
    if not options.window > 0:
        raise UserError(f"--window is {options.window}; it must be above 0")
    folders = [Path(folder).expanduser() for folder in options.folders]
    target = Path(options.output).expanduser() if options.output else folders[0]
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {target} is a file; name a folder")
    result, about = judged(options, folders)
    lines = written(result, about, target)
    print("\n".join(lines))
    print(f"next: open {target / 'evaluation.md'}")
    write_result(result, as_json=options.json, output=None)
    return 0


def parser() -> ArgumentParser:
    """Options of the command."""
    made = OneLine(prog="dsmr evaluate", description="How near generated pieces come to real ones.")
    made.add_argument("folders", type=str, nargs="+", help="Folders of MIDI files; each is judged after its seam.")
    made.add_argument("--split", type=str, default="validation", help="The reference: train, validation or test.")
    made.add_argument(
        "--data.path", type=str | None, default=None, help="MAESTRO, MIDI files (folder or zip) or a store, as of fit."
    )
    made.add_argument("--window", type=float, default=10.0, help="Seconds of the windows of time.")
    made.add_argument("--output", type=str | None, default=None, help="Folder for table, picture, JSON; null: FOLDER.")
    made.add_argument("--json", action="store_true", help="All figures as JSON on the last line of stdout.")
    return made


def judged(options: Namespace, folders: list[Path]) -> tuple[dict[str, Any], str]:
    """All figures, and what they are of.

    Raises:
        UserError: nothing can be read, or the pieces are shorter than a window.
    """
    data = MusicData(options.data.path)
    data.progress = bar("tokenising")
    tokenizer = data.tokenizer
    assert isinstance(tokenizer, Performance)
    read = {str(folder): read_generated(tokenizer, folder) for folder in folders}
    sets = {name: found for name, (found, _) in read.items()}
    excerpts = [excerpt for found in sets.values() for excerpt in found]
    start, seconds = (median(getattr(excerpt, name) for excerpt in excerpts) for name in ("start", "seconds"))
    if seconds < options.window:
        raise UserError(f"the pieces have {seconds:.1f} s of new music; give a --window that is not longer")
    reference = read_reference(tokenizer, data.store, options.split, start, seconds)
    about = (
        f"Reference: seconds {start:.0f} to {start + seconds:.0f} of {len(reference)} {options.split} pieces, the "
        f"stretch that the generated ones have; windows of {options.window:g} s."
    )
    too_few = (
        f"No OA and KL: the reference has {len(reference)} excerpts, and what as many real ones reach cannot be told "
        f"from fewer than {FEWEST}; name a --split or --data.path with more pieces."
    )
    result = {
        "split": options.split,
        "start": start,
        "seconds": seconds,
        "window": options.window,
        "not_compared": too_few if len(reference) < FEWEST else None,
        "rows": evaluate(sets, reference, options.window, training_pitches(tokenizer, data.store)),
        "refused": {name: refused for name, (_, refused) in read.items()},
    }
    return result, about


def written(result: dict[str, Any], about: str, target: Path) -> list[str]:
    """Write table, picture and JSON; gives the table's lines."""
    rows = result["rows"]
    floor = result["not_compared"] or FLOOR
    lines = ["# Generated pieces and real ones", "", about, "", *table(rows), "", EXPLANATION, "", floor, ""]
    for where, reasons in result["refused"].items():
        lines += [f"- not used: {where}/{name}: {reason}" for name, reason in reasons.items()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        if find_spec("matplotlib") is not None:
            from dsmr.analyze.music_plots import plot_features

            plot_features(rows, target / "evaluation.png")
            lines += ["![histograms](evaluation.png)", ""]
        for name, content in (("evaluation.md", "\n".join(lines)), ("evaluation.json", json.dumps(result, indent=1))):
            with replacing(target / name) as file:
                file.write((content + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write to {target} ({error.strerror or error})") from error
    return lines
