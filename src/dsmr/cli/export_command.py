"""`dsmr export`: a trained model as a folder to hand on."""

import shlex
from pathlib import Path

from dsmr.cli.json_output import write_result
from dsmr.cli.options import OneLine, underscored
from dsmr.share.export import export_model


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr export`."""
    made = OneLine(prog="dsmr export", description="A trained model as a folder: weights, settings, model card.")
    made.add_argument("run", type=str, help="The run (its best) or a checkpoint file.")
    made.add_argument("folder", type=str, help="A new folder.")
    made.add_argument("--licence", type=str | None, default=None, help="Of the model; null: follows from the data.")
    made.add_argument("--json", action="store_true", help="What was written, as JSON on the last line of stdout.")
    options = made.parse_args(underscored(arguments))
    folder = Path(options.folder).expanduser()
    description = export_model(options.run, folder, licence=options.licence)
    for name in sorted([*description["files"], "config.json"]):
        print(f"  {folder / name}  {(folder / name).stat().st_size:,} bytes")
    if description["needs"]:
        print(f"not part of dsmr, hand it on as well: {', '.join(description['needs'])}")
    if description["licence"] == "other":
        print(f"the licence of its training data is not known: say it in {folder / 'README.md'}, or give --licence")
    print(f"next: dsmr generate --checkpoint {shlex.quote(str(folder))} --output music.mid")
    write_result({"folder": str(folder), **description}, as_json=options.json, output=None)
    return 0
