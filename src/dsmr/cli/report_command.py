"""`dsmr report`: tables and plots of runs and benchmarks."""

from pathlib import Path

from dsmr import UserError
from dsmr.cli.json_output import write_result
from dsmr.cli.parser import OneLineParser
from dsmr.results.comparisons import comparison_result, group_runs
from dsmr.results.report import write_report
from dsmr.results.runs import collect_results


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr report`."""
    made = OneLineParser(
        prog="dsmr report", description="Summarise the runs and benchmark files of a folder as tables and plots."
    )
    made.add_argument("folder", type=str, help="Folder with runs, or with JSON files of dsmr benchmark.")
    made.add_argument("--output", type=str | None, default=None, help="Folder to write to (default: FOLDER/report).")
    made.add_argument(
        "--against", type=str | None, default=None, help="Run to compare all others with (default: the best)."
    )
    made.add_argument("--format", type=str, default="png", help="Format of the plots: png or svg.")
    made.add_argument("--json", action="store_true", help="Print the results as JSON on the last line of stdout.")
    options = made.parse_args(arguments)
    if options.format not in ("png", "svg"):
        raise UserError(f"--format {options.format} is not one of png, svg")
    source = Path(options.folder)
    found = collect_results(source)
    target = Path(options.output) if options.output else source / "report"
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {target} is a file; name a folder")
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
    write_result(result, as_json=options.json, output=None)
    return 0
