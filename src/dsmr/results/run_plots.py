"""Plots of training runs: learning curves, perplexity by position, and perplexity against speed."""

from collections.abc import Sequence
from math import nan
from pathlib import Path

from dsmr.results.bootstrap import missing_interval_note, ratio_interval
from dsmr.results.plotting import (
    COLOURS,
    FAINT,
    common_rate,
    legend_beside,
    line_style,
    make_panels,
    plain_number,
    token_ticks,
    token_unit,
)
from dsmr.results.runs import Run

MAX_BANDS = 4  # more intervals than these cannot be told apart
POSITION = "val/position/perplexity_"


def plot_learning(runs: Sequence[Run], path: Path) -> None:
    """Plot training NLL (running mean of ten values) and validation perplexity against training tokens."""
    figure, panels = make_panels(2, height=3.4, columns=2, shared=False)
    for number, run in enumerate(runs):
        for axes, column in zip(panels, ("train/nll", "val/perplexity"), strict=True):
            tokens, values = run.curve(column)
            if column == "train/nll":
                values = [sum(values[max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(len(values))]
            marker = "o" if column == "val/perplexity" else ""
            axes.plot(tokens, values, marker=marker, markersize=3, linewidth=1, label=run.name, **line_style(number))
    for axes, label in zip(panels, ("Training NLL (nats/token)", "Validation perplexity"), strict=True):
        axes.set_title(f"{label}, lower is better", fontsize=9)
        axes.set_xlabel("Training tokens", fontsize=8)
        axes.xaxis.set_major_formatter(plain_number)
        axes.locator_params(axis="x", nbins=4)  # more labels of millions of tokens would overlap
        axes.grid(linewidth=0.3, color=FAINT)
    legend_beside(figure, panels[0])
    figure.savefig(path, dpi=150)


def plot_positions(runs: Sequence[Run], path: Path) -> bool:
    """Plot the perplexity of each run's best validation by position; False, without a plot, if no run has any.

    Intervals over pieces are shown for runs with `pieces.csv`, unless there are too many runs to tell apart.
    """
    note = None
    figure, (axes,) = make_panels(1, height=3.6, columns=1)
    for number, run in enumerate(runs):
        points = sorted((int(k.removeprefix(POSITION)), v) for k, v in run.metrics.items() if k.startswith(POSITION))
        style = line_style(number)
        if run.pieces is not None:  # so that line and band come from the same pieces
            table = run.pieces
            parts = zip(table.starts, table.nll_PK.T, table.tokens_PK.T, strict=True)
            intervals = {start: ratio_interval(nll_P, tokens_P, is_exp=True) for start, nll_P, tokens_P in parts}
            known = {start: interval for start, interval in intervals.items() if interval is not None}
            points = [(start, interval.value) for start, interval in known.items()]
            if len(runs) <= MAX_BANDS and known:
                lows, highs = zip(*(interval.ends or (nan, nan) for interval in known.values()), strict=True)
                axes.fill_between(list(known), lows, highs, color=style["color"], alpha=0.12, linewidth=0)
                note = note or missing_interval_note(known.values())
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=run.name, **style)
    if not axes.lines:
        return False
    axes.set_xscale("symlog", base=2, linthresh=128)  # a log axis has no 0, where the first range starts
    axes.set_xlim(left=-8)
    rate = common_rate([run.rate for run in runs])
    axes.xaxis.set_major_formatter(token_ticks(rate))
    axes.set_xlabel(f"Start of the position range ({token_unit(rate)})", fontsize=8)
    axes.set_ylabel("Perplexity (lower is better)", fontsize=8)
    axes.grid(linewidth=0.3, color=FAINT)
    if note:
        axes.set_title(note, fontsize=7, color=FAINT)
    legend_beside(figure, axes)
    figure.savefig(path, dpi=150)
    return True


def plot_tradeoff(runs: Sequence[Run], path: Path) -> bool:
    """Plot perplexity against training speed of runs on one machine, with memory as the area of a disc.

    Memory is the peak on a GPU, and on a CPU the state plus (if known) what autograd saves. Returns False, without a
    plot, if fewer than two runs have all three metrics.
    """
    wanted = ("perf/tokens_per_second", "val/perplexity", "perf/state_mib")
    measured = [run for run in runs if all(run.metrics.get(name) is not None for name in wanted)]
    if len(measured) < 2:
        return False
    on_gpu = all("perf/peak_memory_gib" in run.metrics for run in measured)
    if on_gpu:
        memory = [1024 * run.metrics["perf/peak_memory_gib"] for run in measured]
    else:
        memory = [run.metrics["perf/state_mib"] + run.metrics.get("perf/saved_mib", 0.0) for run in measured]
    figure, (axes,) = make_panels(1, height=4.0, columns=1)
    for number, (run, mib) in enumerate(zip(measured, memory, strict=True)):
        point = (run.metrics["perf/tokens_per_second"], run.metrics["val/perplexity"])
        colour, marker = COLOURS[number % len(COLOURS)], "os^"[number // len(COLOURS) % 3]
        axes.scatter(*point, s=20 + 600 * mib / max(*memory, 1e-9), color=colour, alpha=0.3, linewidths=0)
        axes.plot(*point, marker, color=colour, markersize=4, label=f"{run.name}, {mib:,.0f} MiB")
    axes.margins(x=0.15, y=0.2)
    axes.xaxis.set_major_formatter(plain_number)
    legend_beside(figure, axes)
    axes.set_xlabel("Training speed (tokens/s, higher is better)", fontsize=8)
    axes.set_ylabel("Best validation perplexity (lower is better)", fontsize=8)
    axes.set_title(f"Disc area: {'peak memory' if on_gpu else 'saved for backward + state'}", fontsize=9)
    axes.grid(linewidth=0.3, color=FAINT)
    figure.savefig(path, dpi=150)
    return True
