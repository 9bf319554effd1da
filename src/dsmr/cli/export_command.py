"""`dsmr export`: a trained model as a folder to share."""

import shlex
from pathlib import Path

from dsmr.cli.common_options import JSON, add_options, write_result
from dsmr.cli.parser import OneLineParser
from dsmr.share.export import export_model


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr export`."""
    parser = OneLineParser("dsmr export", "Export a trained model as a folder: weights, settings and model card.")
    parser.add_argument("run", type=str, help="Run (its best checkpoint) or checkpoint file.")
    parser.add_argument("folder", type=str, help="Folder to create.")
    licence = (str | None, None, "Licence of the model (default: that of the training data).")
    add_options(parser, {"--licence": licence, **JSON})
    options = parser.parse_args(arguments)
    folder = Path(options.folder).expanduser()
    description = export_model(options.run, folder, licence=options.licence)
    for name in sorted([*description["files"], "config.json"]):
        print(f"  {folder / name}  {(folder / name).stat().st_size:,} bytes")
    if description["needs"]:
        print(f"not part of dsmr, so share it too: {', '.join(description['needs'])}")
    if description["licence"] == "other":
        print(f"the licence of the training data is unknown: state it in {folder / 'README.md'}, or give --licence")
    print(f"next: dsmr generate --checkpoint {shlex.quote(str(folder))} --output music.mid")
    write_result({"folder": str(folder), **description}, as_json=options.json)
    return 0
