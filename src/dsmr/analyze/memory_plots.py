"""Plots of attention by distance and of savings by note. They need matplotlib, which `dsmr[app]` installs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsmr.results.plotting import BAR, FAINT, LINE, make_panels

if TYPE_CHECKING:
    from dsmr.analyze.notes import NoteSavings, Passage


def plot_distances(
    shares_LHN: Any, starts: Sequence[int], horizons: Sequence[int], segment_length: int, path: Path
) -> None:
    """Plot attention by distance, one panel per layer: heads as thin lines, their mean as a thick one.

    `shares` are of a query's attention by layer, head and class of distances, which begin at `starts` (tokens).
    """
    shares = np.asarray(shares_LHN)
    figure, panels = make_panels(len(shares), height=2.2)
    where = np.arange(len(starts))
    labels = [f"{start:,}" for start in starts]
    for layer, axes in enumerate(panels):
        for head in shares[layer]:
            axes.plot(where, head, color=FAINT, linewidth=0.5)
        axes.plot(where, shares[layer].mean(axis=0), color=BAR, linewidth=1.5)
        for tokens, colour in ((segment_length, FAINT), (horizons[layer], LINE)):
            if tokens:
                axes.axvline(np.interp(np.log2(tokens), np.log2(starts[1:]), where[1:]), color=colour, linewidth=0.8)
        axes.set_title(f"layer {layer}, horizon {horizons[layer]:,}", fontsize=8)
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(0, 1.3 * shares.max())
        axes.set_xticks(where[::2], labels[::2], rotation=45)
        axes.grid(axis="y", linewidth=0.3, color=FAINT)
    figure.supxlabel("distance in tokens, from (grey: segment length, red: horizon)", fontsize=8)
    figure.supylabel("share of attention", fontsize=8)
    figure.savefig(path, dpi=150)


def plot_note_savings(notes: "NoteSavings", passages: "Sequence[Passage]", path: Path, *, title: str = "") -> None:
    """Plot a piano roll, coloured by the nats that memory saved in each note; passages are marked with their ranks."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure, (axes,) = make_panels(1, height=3.6, columns=1)
    limit = max(float(np.quantile(np.abs(notes.saved_N), 0.98)), 0.1)
    mapping = ScalarMappable(Normalize(-limit, limit), "coolwarm")  # zero is in the middle
    order = np.argsort(notes.saved_N)  # draws the notes that memory helped with on top
    durations, shades = np.maximum(notes.duration_N[order], 0.02), mapping.to_rgba(notes.saved_N[order])
    axes.barh(notes.pitch_N[order], durations, left=notes.onset_N[order], height=0.9, color=shades)
    colours = figure.colorbar(mapping, ax=axes, pad=0.01, fraction=0.03, extend="both", label="nats that memory saved")
    colours.ax.tick_params(labelsize=7)
    colours.ax.yaxis.label.set_fontsize(8)
    top = max(108, int(notes.pitch_N.max())) + 1
    for rank, passage in enumerate(passages, start=1):
        axes.axvspan(passage.start, passage.end, color=LINE, alpha=0.12, linewidth=0)
        axes.text((passage.start + passage.end) / 2, top, str(rank), fontsize=7, ha="center", va="bottom")
    axes.set_yticks(range(24, 97, 12), ["C1", "C2", "C3", "C4", "C5", "C6", "C7"])
    axes.set(ylim=(min(21, int(notes.pitch_N.min())) - 1, top), xlim=(0, (notes.onset_N + notes.duration_N).max()))
    axes.set_facecolor("#f4f4f4")
    axes.set_xlabel("seconds", fontsize=8)
    axes.grid(axis="y", linewidth=0.3, color=FAINT)
    axes.set_title(title, fontsize=9, loc="left", pad=14)
    figure.savefig(path, dpi=150)
