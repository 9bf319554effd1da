"""Plots of generated music beside real music. They need matplotlib, which `dsmr[app]` installs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsmr.analyze.judging.features import QUANTITIES, WINDOW_METRICS
from dsmr.results.plotting import COLOURS, FAINT, make_panels

NUM_BINS = 16


def plot_features(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Plot the histograms of notes and the metrics of windows of `compare_sets`; the first row is the reference."""
    figure, panels = make_panels(len(QUANTITIES) + len(WINDOW_METRICS), height=2.2, shared=False)
    for axes, (name, quantity) in zip(panels, QUANTITIES.items(), strict=False):
        for number, (label, row) in enumerate(rows.items()):
            _outline(axes, np.asarray(row["histograms"][name]), quantity.edges, number, label)
        axes.set_title(quantity.label, fontsize=8)
        if name in ("inter_onset", "duration"):
            axes.set_xscale("symlog", linthresh=0.01)
            axes.set_xlim(0, 12)
            axes.set_xticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
            axes.minorticks_off()
        if name == "pitch":
            axes.set_xlim(20, 109)
    for axes, (name, title) in zip(panels[len(QUANTITIES) :], WINDOW_METRICS.items(), strict=True):
        sets = [row[name]["values"] if name in row else [] for row in rows.values()]
        together = [value for values in sets for value in values]
        edges = np.histogram_bin_edges(together, NUM_BINS, range=(0, float(np.quantile(together, 0.99))))
        for number, (label, values) in enumerate(zip(rows, sets, strict=True)):
            _outline(axes, np.histogram(np.minimum(values, edges[-1]), edges)[0], edges, number, label)
        axes.set_title(title, fontsize=8)
    for axes in panels:
        axes.set_yticks([])
        axes.set_ylim(bottom=0)
    figure.supylabel("share of notes, or of windows", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def _outline(axes: Any, counts: Any, edges: Any, number: int, label: str) -> None:
    """Draw the shares of a histogram: the reference filled, the others as lines."""
    filled = {"color": FAINT, "fill": True, "alpha": 0.5}
    style = {"color": COLOURS[(number - 1) % len(COLOURS)], "linewidth": 1} if number else filled
    axes.stairs(counts / max(counts.sum(), 1), edges, label=label, **style)
