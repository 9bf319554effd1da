"""What music is like, in figures that need no bars: of all notes, and of windows of time.

Entropy and divergence are scipy's. The figures follow Yang and Lerch (On the evaluation of generative models in
music, 2018) and MusPy (arXiv 2008.01951), whose own windows are bars; performances have none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsmr.analyze.excerpts import Excerpt
from dsmr.data.tokenizer import TICKS_PER_SECOND

PRIOR = 0.5  # added to the count of each bin: a bin that is empty in one set is no infinite divergence


@dataclass(frozen=True)
class Quantity:
    """A quantity of each note.

    Attributes:
        label: with its unit.
        edges: of the bins; values beyond the ends count in the outermost ones.
        values: of an excerpt's notes.
    """

    label: str
    edges: NDArray[Any]
    values: Callable[[Excerpt], NDArray[np.float64]]


def inter_onset(excerpt: Excerpt) -> NDArray[np.float64]:
    """Seconds from each note to the next; 0 within a chord."""
    gaps: NDArray[np.float64] = np.diff(excerpt.onset) / TICKS_PER_SECOND
    return gaps


def seconds_edges() -> NDArray[np.float64]:
    """Below a tick, then in steps of a quarter octave from 10 ms to about 10 s."""
    return np.concatenate([[-0.005], 0.005 * 2 ** np.arange(0, 11.25, 0.25)])


QUANTITIES = {
    "pitch": Quantity("pitch", np.arange(129) - 0.5, lambda e: e.pitch.astype(np.float64)),
    "velocity": Quantity("velocity", np.arange(0, 129, 4) - 0.5, lambda e: e.velocity.astype(np.float64)),
    "inter_onset": Quantity("seconds to the next onset", seconds_edges(), inter_onset),
    "duration": Quantity("duration in seconds", seconds_edges(), lambda e: e.duration / TICKS_PER_SECOND),
}


def histogram(excerpts: Sequence[Excerpt], quantity: Quantity) -> NDArray[np.float64]:
    """Counts of all excerpts' notes in the quantity's bins."""
    values = np.concatenate([quantity.values(excerpt) for excerpt in excerpts])
    inside = np.clip(values, quantity.edges[0] + 1e-9, quantity.edges[-1] - 1e-9)
    counts: NDArray[np.float64] = np.histogram(inside, quantity.edges)[0].astype(np.float64)
    return counts


def overlap_area(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area under both histograms, each of area 1: 1 where they are alike, 0 where they share no bin.

    Args:
        first: counts; bins are the last dimension.
        second: likewise.
    """
    shares = (counts / counts.sum(axis=-1, keepdims=True) for counts in (first, second))
    area: NDArray[np.float64] = np.minimum(*shares).sum(axis=-1)
    return area


def divergence(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kullback-Leibler divergence of the first from the second, in nats; arguments as of `overlap_area`."""
    from scipy.stats import entropy

    nats: NDArray[np.float64] = entropy(first + PRIOR, second + PRIOR, axis=-1)
    return nats


@dataclass(frozen=True)
class Window:
    """Figures of a stretch of time.

    Attributes:
        pitch_class_entropy: bits, of the note-ons' pitch classes; 3.58 where all twelve are alike.
        polyphony: mean number of notes that sound while any does.
        density: notes per second.
    """

    pitch_class_entropy: float
    polyphony: float
    density: float


WINDOW_FIGURES = {
    "pitch_class_entropy": "pitch-class entropy, bits",
    "polyphony": "notes that sound at once",
    "density": "notes per second",
}


def windows(excerpts: Sequence[Excerpt], seconds: float) -> list[Window]:
    """Figures of all whole windows of so many seconds in which a note begins, one after another in each excerpt."""
    from scipy.stats import entropy

    length, found = round(seconds * TICKS_PER_SECOND), []
    for excerpt in excerpts:
        for first in range(0, round(excerpt.seconds * TICKS_PER_SECOND) - length + 1, length):
            struck = (excerpt.onset >= first) & (excerpt.onset < first + length)
            if not struck.any():
                continue
            classes = np.bincount(excerpt.pitch[struck] % 12, minlength=12)
            start, end = np.clip([excerpt.onset, excerpt.onset + excerpt.duration], first, first + length)
            changes = np.zeros(length + 1, np.int64)
            np.add.at(changes, start - first, 1)
            np.add.at(changes, end - first, -1)
            sounding = np.cumsum(changes)[:-1]
            polyphony = float(sounding[sounding > 0].mean())
            found.append(Window(float(entropy(classes, base=2)), polyphony, float(struck.sum() / seconds)))
    return found
