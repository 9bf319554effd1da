"""Write collected results as a report: README.md with tables and plots."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dsmr import UserError
from dsmr.data.files import atomic_write
from dsmr.results.benchmark_plots import plot_benchmark, plot_piece_lengths
from dsmr.results.comparisons import comparison_table, group_runs
from dsmr.results.plotting import check_plots
from dsmr.results.run_plots import plot_learning, plot_positions, plot_tradeoff
from dsmr.results.runs import ResultCollection, Run, error_reason
from dsmr.results.schedule_plots import ScheduleShape, plot_schedules
from dsmr.results.tables import benchmark_table, runs_table

Plot = Callable[[Path, str], list[str]]
"""Plots into a folder, in a format; returns the Markdown that shows the plots."""


def write_report(found: ResultCollection, target: Path, suffix: str, against: str | None = None) -> list[str]:
    """Write README.md and its plots (png or svg) to an existing folder; return the lines of README.md.

    The tables are written before any plot, so that they are kept if plotting fails. All runs are compared with the
    one named `against`, by default the best.
    """
    sections: list[tuple[list[str], Plot]] = []
    if found.runs:
        tables, scored = ["## Runs", "", *runs_table(found.runs), ""], group_runs(found.runs)
        if against is not None or len(scored) > 1:
            tables += ["## Which is better", "", *comparison_table(scored, against), ""]
        sections.append((tables, partial(plot_runs, found.runs)))
    for name, result in list(found.benchmarks.items()):
        try:
            tables = [f"## Benchmark {name}", "", *benchmark_table(result), ""]
        except Exception as error:  # a damaged file must not hide the other results
            found.unread[name] = error_reason(error)
            del found.benchmarks[name]
            continue
        sections.append((tables, partial(plot_benchmarks, name.replace("/", "-"), result)))
    unread = [f"{name} could not be read: {reason}" for name, reason in found.unread.items()]
    plain = ["# Report", "", *(line for tables, _ in sections for line in tables), *unread]
    _save(plain, target)
    try:
        check_plots()
    except UserError as missing:
        lines = [*plain, "", f"No plots: {missing}"]
    else:
        parts = [[*tables, *plot(target, suffix)] for tables, plot in sections]
        lines = ["# Report", "", *(line for part in parts for line in part), *unread]
    _save(lines, target)
    return lines


def _save(lines: list[str], target: Path) -> None:
    with atomic_write(target / "README.md") as file:
        file.write(("\n".join(lines).rstrip() + "\n").encode())


def plot_runs(runs: list[Run], target: Path, suffix: str) -> list[str]:
    """Plot learning curves, positions, trade-off and schedules of runs; return the Markdown that shows them."""
    plot_learning(runs, target / f"learning.{suffix}")
    lines = [f"![learning curves](learning.{suffix})", ""]
    if plot_positions(runs, target / f"positions.{suffix}"):
        lines += [f"![perplexity by position in the piece](positions.{suffix})", ""]
    if plot_tradeoff(runs, target / f"tradeoff.{suffix}"):
        lines += [f"![perplexity against speed and memory](tradeoff.{suffix})", ""]
    shapes: dict[str, ScheduleShape] = {}
    for run in runs:
        if run.horizons:
            shape = ScheduleShape(run.horizons, run.segment_length, run.rule, run.rate)
            if shape not in shapes.values():  # seeds share a schedule
                shapes[run.name] = shape
    if shapes:
        plot_schedules(shapes, target / f"schedules.{suffix}")
        lines += [f"![horizon and receptive field of each layer](schedules.{suffix})", ""]
    return lines


def plot_benchmarks(stem: str, result: dict[str, Any], target: Path, suffix: str) -> list[str]:
    """Plot a benchmark; return the Markdown that shows it."""
    lines = []
    if any(row.get("kind") == "training" for row in result["rows"]):
        plot_benchmark(result, target / f"{stem}-speed.{suffix}")
        lines += [f"![speed against memory]({stem}-speed.{suffix})", ""]
    if result.get("pieces"):
        plot_piece_lengths(result["pieces"], target / f"{stem}-pieces.{suffix}")
        lines += [f"![time and memory against the length of a piece]({stem}-pieces.{suffix})", ""]
    return lines
