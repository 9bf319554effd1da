"""Plots of benchmark results: speed against memory, and cost against piece length."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmr.results.plotting import BAR, COLOURS, FAINT, LINE, make_panels, plain_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_benchmark(result: Mapping[str, Any], path: Path) -> None:
    """Plot training speed against memory, one point per row, labelled with its perplexity if measured."""
    figure, (axes,) = make_panels(1, height=4.6, columns=1)
    rows = [row for row in result["rows"] if row.get("kind") == "training"]
    has_peak = all("peak_memory_gib" in row for row in rows)
    axes.set(xscale="log", yscale="log")
    labels = []
    for row in rows:
        point = (row["peak_memory_gib"] if has_peak else row["saved_and_state_mib"], row["tokens_per_second"])
        is_peer = row["name"].startswith(("x_transformers", "perceiver_ar_pytorch"))
        axes.plot(*point, "s" if is_peer else "o", color=LINE if is_peer else BAR, markersize=5)
        labels.append((point, row["name"] + (f" ({row['perplexity']:.2f})" if "perplexity" in row else "")))
    axes.margins(x=0.25, y=0.1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain_number)
        axis.set_minor_formatter(plain_number)
        axis.set_tick_params(which="both", labelsize=7)
    annotate_apart(axes, labels)
    memory = "Peak memory (GiB)" if has_peak else "Saved for backward + state (MiB)"
    axes.set_xlabel(f"{memory}, lower is better", fontsize=8)
    axes.set_ylabel("Training speed (tokens/s), higher is better", fontsize=8)
    axes.grid(which="both", linewidth=0.3, color=FAINT)
    figure.savefig(path, dpi=150)


def annotate_apart(axes: "Axes", labels: Sequence[tuple[tuple[float, float], str]]) -> None:
    """Write each label to the right of its point, moved up until it overlaps no other."""
    size = 7
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # fixes the transform from data to pixels
    points_per_pixel = 72 / axes.figure.dpi
    taken: list[tuple[float, float, float]] = []  # left, right, bottom, in points
    for point, text in sorted(labels, key=lambda label: label[0][1]):
        x, y = axes.transData.transform(point) * points_per_pixel
        left, right, bottom = x + 6, x + 6 + 0.62 * size * len(text), y - size / 2
        while any(left < ends and begins < right and abs(bottom - low) < size + 1 for begins, ends, low in taken):
            bottom += 1
        taken.append((left, right, bottom))
        axes.annotate(text, point, xytext=(6, bottom - y), textcoords="offset points", fontsize=size)


def plot_piece_lengths(curves: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot time and memory against piece length, from `pieces` of a benchmark result."""
    figure, panels = make_panels(2, height=3.2, columns=2, shared=False)
    for number, curve in enumerate(curves):
        tokens = [point["tokens"] for point in curve["points"]]
        for axes, key in zip(panels, ("seconds", "state_mib"), strict=True):
            values = [point[key] for point in curve["points"]]
            axes.plot(tokens, values, "o-", color=COLOURS[number], markersize=3, linewidth=1, label=curve["name"])
    for axes, label in zip(panels, ("Time to read the piece (s)", "State (MiB)"), strict=True):
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("Piece length (tokens)", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(linewidth=0.3, color=FAINT)
        axes.legend(fontsize=7, frameon=False)
    figure.suptitle("Time and memory vs. piece length", fontsize=10)
    figure.savefig(path, dpi=150)
