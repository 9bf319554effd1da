"""`dsmr report`: tables and plots of runs and benchmarks."""

from pathlib import Path

from dsmr import UserError
from dsmr.cli.common_options import JSON, add_options, check_output_folder, write_result
from dsmr.cli.parser import OneLineParser
from dsmr.results.comparisons import comparison_result, group_runs
from dsmr.results.report import write_report
from dsmr.results.runs import collect_results

OPTIONS = {
    "--output": (str | None, None, "Folder to write to (default: FOLDER/report)."),
    "--against": (str | None, None, "Run to compare all others with (default: the best)."),
    "--format": (str, "png", "Format of the plots: png or svg."),
    **JSON,
}


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr report`."""
    parser = OneLineParser("dsmr report", "Summarise the runs and benchmark files of a folder as tables and plots.")
    parser.add_argument("folder", type=str, help="Folder with runs, or with JSON files of dsmr benchmark.")
    add_options(parser, OPTIONS)
    options = parser.parse_args(arguments)
    if options.format not in ("png", "svg"):
        raise UserError(f"--format {options.format} is not one of png, svg")
    source = Path(options.folder)
    found = collect_results(source)
    target = check_output_folder(Path(options.output) if options.output else source / "report")
    target.mkdir(parents=True, exist_ok=True)
    print("\n".join(write_report(found, target, options.format, options.against)))
    print(f"next: open {target / 'README.md'}")
    result = {
        "report": str(target / "README.md"),
        "runs": [{"name": run.name, **run.metrics} for run in found.runs],
        "paired": comparison_result(group_runs(found.runs), options.against),
        "benchmarks": list(found.benchmarks),
        "unread": found.unread,
    }
    write_result(result, as_json=options.json)
    return 0
