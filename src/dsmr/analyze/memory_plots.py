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

    Args:
        shares_LHN: share of a query's attention by layer, head and class of distances.
        starts: first distance of each class, in tokens.
        horizons: of the layers.
        segment_length: T.
        path: image file.

    Raises:
        UserError: matplotlib is missing.
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
    """Plot a piano roll, coloured by the nats that memory saved in each note.

    Args:
        notes: of the piece.
        passages: marked above the notes with their ranks.
        path: image file.
        title: of the plot.

    Raises:
        UserError: matplotlib is missing.
    """
    figure, (axes,) = make_panels(1, height=3.6, columns=1)
    limit = max(float(np.quantile(np.abs(notes.saved_N), 0.98)), 0.1)
    order = np.argsort(notes.saved_N)  # draws the notes that memory helped with on top
    bars = axes.barh(
        notes.pitch_N[order], np.maximum(notes.duration_N[order], 0.02), left=notes.onset_N[order], height=0.9
    )
    colours = figure.colorbar(
        _mapping(limit), ax=axes, pad=0.01, fraction=0.03, extend="both", label="nats that memory saved"
    )
    colours.ax.tick_params(labelsize=7)
    colours.ax.yaxis.label.set_fontsize(8)
    shades = _mapping(limit).to_rgba(notes.saved_N[order])
    for bar, shade in zip(bars, shades, strict=True):
        bar.set_facecolor(shade)
    top = max(108, int(notes.pitch_N.max())) + 1
    for rank, passage in enumerate(passages, start=1):
        axes.axvspan(passage.start, passage.end, color=LINE, alpha=0.12, linewidth=0)
        axes.text((passage.start + passage.end) / 2, top, str(rank), fontsize=7, ha="center", va="bottom")
    axes.set_yticks([24, 36, 48, 60, 72, 84, 96], ["C1", "C2", "C3", "C4", "C5", "C6", "C7"])
    axes.set_ylim(min(21, int(notes.pitch_N.min())) - 1, top)
    axes.set_xlim(0, float((notes.onset_N + notes.duration_N).max()))
    axes.set_facecolor("#f4f4f4")
    axes.set_xlabel("seconds", fontsize=8)
    axes.grid(axis="y", linewidth=0.3, color=FAINT)
    axes.set_title(title, fontsize=9, loc="left", pad=14)
    figure.savefig(path, dpi=150)


def _mapping(limit: float) -> Any:
    """Map nats to colours, with zero in the middle."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(-limit, limit), "coolwarm")
