"""Piano rolls of generated music. They need matplotlib, which comes with `dsmr[app]`."""

from pathlib import Path
from typing import TYPE_CHECKING

from dsmr.results.plotting import FAINT, make_panels

if TYPE_CHECKING:
    from symusic import Score

PROMPT, GENERATED = (0.35, 0.35, 0.35), (0.1, 0.2, 0.65)  # red, green, blue


def plot_piano_roll(score: "Score", path: Path, *, title: str = "", seam: float | None = None) -> None:
    """Plot notes over time, darker if louder, the prompt and the generated part in two colours, the pedal below.

    `seam` is the second at which the prompt ends; None without a prompt.
    """
    figure, (axes,) = make_panels(1, height=2.9, columns=1)
    tracks = score.to("second").tracks
    notes = [note for track in tracks for note in track.notes]
    first = 0.0 if seam is None else seam - 0.005  # times come in ticks of 10 ms: half a tick of slack
    for name, colour, is_new in (("prompt", PROMPT, False), ("new", GENERATED, True)):
        part = [note for note in notes if (note.time >= first) == is_new]
        axes.barh(
            [note.pitch for note in part],
            [note.duration for note in part],
            left=[note.time for note in part],
            height=0.9,
            color=[(*colour, 0.25 + 0.75 * note.velocity / 127) for note in part],
            label=name if seam is not None else None,
        )
    axes.set_xlabel("Time (s)", fontsize=8)
    axes.set_ylabel("Pitch", fontsize=8)
    axes.set_yticks([24, 36, 48, 60, 72, 84, 96], ["C1", "C2", "C3", "C4", "C5", "C6", "C7"])
    pitches = [21, 108, *(note.pitch for note in notes)]  # a piano's keys, and what lies beyond them
    low, high = min(pitches) - 1, max(pitches) + 1
    pedals = [(pedal.time, pedal.duration) for track in tracks for pedal in track.pedals]
    if pedals:
        axes.broken_barh(pedals, (low - 4, 2.5), facecolor=FAINT, label="pedal")
        low -= 5
    axes.set_ylim(low, high)
    axes.set_xlim(0, max([note.time + note.duration for note in notes], default=1.0))
    if seam is not None:
        axes.axvline(seam, color=FAINT, linewidth=0.8, linestyle="--")
    if seam is not None or pedals:
        figure.legend(loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    axes.grid(axis="y", linewidth=0.3, color=FAINT)
    axes.set_title(title, fontsize=9, loc="left")
    figure.savefig(path, dpi=120)
