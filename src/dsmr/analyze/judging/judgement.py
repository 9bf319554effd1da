"""The judgement of folders of generated music: metrics, tables, plots and files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dsmr import UserError
from dsmr.analyze.judging.copying import training_pitches
from dsmr.analyze.judging.excerpts import read_generated, read_reference
from dsmr.analyze.judging.features import QUANTITIES, WINDOW_METRICS
from dsmr.analyze.judging.music_comparison import FEWEST, NUM_DRAWS, compare_sets, judgement_table
from dsmr.data.datamodule import MusicData
from dsmr.data.files import atomic_write
from dsmr.data.performance import Performance
from dsmr.data.sources import Split
from dsmr.results.plotting import COLOURS, FAINT, make_panels

EXPLANATION = (
    "OA is the overlap area of two histograms (1: identical, 0: nothing in common), KL the Kullback-Leibler "
    "divergence from the reference in nats. The longest run is the longest sequence of pitches that a piece shares "
    "with any training piece, as the median over pieces; the reference's own run shows how much real pieces share."
)
FLOOR = (
    "OA and KL depend on the number of excerpts. Below each set is its floor: the same number of real excerpts, drawn "
    f"from the reference at random {NUM_DRAWS:,} times and compared with the rest of it; the mean and, in brackets, "
    "the range of 95 % of the draws. The set is compared with the same rests. A histogram within the range cannot be "
    "distinguished from that of real excerpts; real music from elsewhere, such as another split, may fall outside. A "
    "set of more than half the reference is thinned to half of it at random in each draw. Continuations of the same "
    "prompt are more alike than as many pieces: for a fair comparison, use one continuation of each prompt."
)


@dataclass(frozen=True)
class Judgement:
    """Folders of generated music compared with the same stretch of real pieces."""

    split: Split  # of the reference
    start: float  # of the stretch, in seconds
    seconds: float  # its length
    window: float  # seconds of each window of time
    num_reference: int  # excerpts of the reference
    rows: dict[str, dict[str, Any]]  # metrics of the reference and of each folder, by name
    refused: dict[str, dict[str, str]]  # files that could not be read, by folder, with reasons

    @property
    def not_compared(self) -> str | None:
        """The reason if OA and KL cannot be computed, else None."""
        if self.num_reference >= FEWEST:
            return None
        return (
            f"No OA and KL: the reference has {self.num_reference} excerpts, and a floor needs {FEWEST} or more; name "
            "a --split or --data.path with more pieces."
        )

    def lines(self) -> list[str]:
        """The judgement as Markdown."""
        about = (
            f"Reference: seconds {self.start:.0f} to {self.start + self.seconds:.0f} of {self.num_reference} "
            f"{self.split} pieces, the stretch that the generated pieces cover; windows of {self.window:g} s."
        )
        lines = ["# Generated pieces and real ones", "", about, "", *judgement_table(self.rows), "", EXPLANATION, ""]
        lines += [self.not_compared or FLOOR, ""]
        for folder, reasons in self.refused.items():
            lines += [f"- not used: {folder}/{name}: {reason}" for name, reason in reasons.items()]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """All metrics, for JSON."""
        return asdict(self) | {"not_compared": self.not_compared}

    def write(self, folder: Path) -> list[str]:
        """Write `evaluation.md`, `.json` and, if matplotlib is installed, `.png`; return the lines of the Markdown."""
        lines = self.lines()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if find_spec("matplotlib") is not None:
                plot_features(self.rows, folder / "evaluation.png")
                lines += ["![histograms](evaluation.png)", ""]
            contents = {"evaluation.md": "\n".join(lines), "evaluation.json": json.dumps(self.as_dict(), indent=1)}
            for name, content in contents.items():
                with atomic_write(folder / name) as file:
                    file.write((content + "\n").encode())
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error.strerror or error})") from error
        return lines


def judge_folders(
    folders: Sequence[Path], data: MusicData, split: Split = "validation", window: float = 10.0
) -> Judgement:
    """Compare folders of generated MIDI files with the same stretch of real pieces, of `performance` tokens.

    Each folder is one set; files are judged from the marker where their prompt ends. Windows of time are in seconds.
    UserError if no file can be used, or the pieces are shorter than a window.
    """
    tokenizer = data.tokenizer
    assert isinstance(tokenizer, Performance)
    found = {str(folder): read_generated(tokenizer, folder) for folder in folders}
    sets = {name: excerpts for name, (excerpts, _) in found.items()}
    together = [excerpt for excerpts in sets.values() for excerpt in excerpts]
    start, seconds = (median(getattr(excerpt, name) for excerpt in together) for name in ("start", "seconds"))
    if seconds < window:
        raise UserError(f"the pieces have {seconds:.1f} s of new music; give a --window no longer than that")
    reference = read_reference(tokenizer, data.store, split, start, seconds)
    rows = compare_sets(sets, reference, window, training_pitches(tokenizer, data.store))
    refused = {name: reasons for name, (_, reasons) in found.items()}
    return Judgement(split, start, seconds, window, len(reference), rows, refused)


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
        edges = np.histogram_bin_edges(together, 16, range=(0, float(np.quantile(together, 0.99))))
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
