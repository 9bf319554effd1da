"""`dsmr report`: runs and benchmark files to tables and pictures."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dsmr import UserError
from dsmr.cli.json_output import write_result
from dsmr.cli.options import OneLine
from dsmr.data.files import atomic_write
from dsmr.results.benchmark_plots import plot_benchmark, plot_piece_lengths
from dsmr.results.comparisons import comparison_result, comparison_table, group_runs
from dsmr.results.plotting import check_plots
from dsmr.results.run_plots import plot_learning, plot_positions, plot_tradeoff
from dsmr.results.runs import ResultCollection, Run, collect_results, error_reason
from dsmr.results.schedule_plots import ScheduleShape, plot_schedules
from dsmr.results.tables import benchmark_table, runs_table

Draw = Callable[[Path, str], list[str]]
"""Draws pictures into a folder, with a suffix; gives the lines of README.md that show them."""


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr report`."""
    made = OneLine(prog="dsmr report", description="Runs and benchmark files under a folder, as tables and pictures.")
    made.add_argument("folder", type=str, help="Folder with runs, or with JSON files of dsmr benchmark.")
    made.add_argument("--output", type=str | None, default=None, help="Folder for the report; None: FOLDER/report.")
    made.add_argument(
        "--against", type=str | None, default=None, help="Compare every run with this one; None: the best."
    )
    made.add_argument("--format", type=str, default="png", help="Of the pictures: png or svg.")
    made.add_argument("--json", action="store_true", help="What was found, as JSON on the last line of stdout.")
    options = made.parse_args(arguments)
    if options.format not in ("png", "svg"):
        raise UserError(f"--format {options.format} is not one of png, svg")
    source = Path(options.folder)
    found = collect_results(source)
    target = Path(options.output) if options.output else source / "report"
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {target} is a file; name a folder")
    target.mkdir(parents=True, exist_ok=True)
    lines = write(found, target, options.format, options.against)
    print("\n".join(lines))
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


def write(found: ResultCollection, target: Path, suffix: str, against: str | None = None) -> list[str]:
    """Write README.md and its pictures; gives the lines of README.md.

    The tables are written before anything is drawn, and stay where nothing can be.

    Args:
        found: runs and benchmarks.
        target: folder.
        suffix: of the pictures.
        against: run that all others are compared with; None means the best.
    """
    sections: list[tuple[list[str], Draw]] = []
    if found.runs:
        sections.append((runs_section(found.runs, against), partial(run_pictures, found.runs)))
    for name, result in list(found.benchmarks.items()):
        try:
            tables = [f"## Benchmark {name}", "", *benchmark_table(result), ""]
        except Exception as error:  # whatever is wrong with one file, the others are shown
            found.unread[name] = error_reason(error)
            del found.benchmarks[name]
            continue
        sections.append((tables, partial(benchmark_pictures, name.replace("/", "-"), result)))
    unread = [f"{name} could not be read: {reason}" for name, reason in found.unread.items()]
    plain = ["# Report", "", *(line for tables, _ in sections for line in tables), *unread]
    save(plain, target)
    try:
        check_plots()
    except ValueError as missing:
        lines = [*plain, "", f"No pictures: {missing}"]
    else:
        parts = [[*tables, *draw(target, suffix)] for tables, draw in sections]
        lines = ["# Report", "", *(line for part in parts for line in part), *unread]
    save(lines, target)
    return lines


def save(lines: list[str], target: Path) -> None:
    """Write README.md."""
    with atomic_write(target / "README.md") as file:
        file.write(("\n".join(lines).rstrip() + "\n").encode())


def runs_section(runs: list[Run], against: str | None) -> list[str]:
    """Tables of runs, and which is better."""
    lines = ["## Runs", "", *runs_table(runs), ""]
    scored = group_runs(runs)
    if against is not None or len(scored) > 1:
        lines += ["## Which is better", "", *comparison_table(scored, against), ""]
    return lines


def run_pictures(runs: list[Run], target: Path, suffix: str) -> list[str]:
    """Draw what the runs have; gives the lines that show it."""
    plot_learning(runs, target / f"learning.{suffix}")
    lines = [f"![learning curves](learning.{suffix})", ""]
    if plot_positions(runs, target / f"positions.{suffix}"):
        lines += [f"![perplexity by position in the piece](positions.{suffix})", ""]
    if plot_tradeoff(runs, target / f"tradeoff.{suffix}"):
        lines += [f"![perplexity against speed and memory](tradeoff.{suffix})", ""]
    depths: dict[str, ScheduleShape] = {}
    for run in runs:
        depth = ScheduleShape(run.horizons, run.segment_length, run.rule, run.rate) if run.horizons else None
        if depth is not None and depth not in depths.values():  # seeds look alike
            depths[run.name] = depth
    if depths:
        plot_schedules(depths, target / f"schedules.{suffix}")
        lines += [f"![what each layer keeps, and how far back it sees](schedules.{suffix})", ""]
    return lines


def benchmark_pictures(stem: str, result: dict[str, Any], target: Path, suffix: str) -> list[str]:
    """Draw what a benchmark has; gives the lines that show it."""
    lines = []
    if any(row.get("kind") == "training" for row in result["rows"]):
        plot_benchmark(result, target / f"{stem}-speed.{suffix}")
        lines += [f"![speed against memory]({stem}-speed.{suffix})", ""]
    if result.get("pieces"):
        plot_piece_lengths(result["pieces"], target / f"{stem}-pieces.{suffix}")
        lines += [f"![time and memory against the length of a piece]({stem}-pieces.{suffix})", ""]
    return lines
