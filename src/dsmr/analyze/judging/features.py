"""Musical features that need no bars: histograms over notes, and metrics of windows of time.

They follow Yang and Lerch (On the evaluation of generative models in music, 2018) and MusPy (arXiv 2008.01951),
which use bars as windows; recorded performances have none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsmr.analyze.judging.excerpts import Excerpt
from dsmr.data.performance import TICKS_PER_SECOND

PRIOR = 0.5  # added to the count of each bin, so that a bin that is empty in one set does not make KL infinite


@dataclass(frozen=True)
class Quantity:
    """A quantity that each note has."""

    label: str  # with its unit
    edges: NDArray[Any]  # of the bins; values beyond the ends count in the outermost bins
    values: Callable[[Excerpt], NDArray[np.float64]]  # of each note of an excerpt


# one bin below a tick, then steps of a quarter octave from 10 ms to about 10 s
SECONDS = np.concatenate([[-0.005], 0.005 * 2 ** np.arange(0, 11.25, 0.25)])
QUANTITIES = {
    "pitch": Quantity("pitch", np.arange(129) - 0.5, lambda e: e.pitch.astype(np.float64)),
    "velocity": Quantity("velocity", np.arange(0, 129, 4) - 0.5, lambda e: e.velocity.astype(np.float64)),
    # from each note to the next; 0 within a chord
    "inter_onset": Quantity("seconds to the next onset", SECONDS, lambda e: np.diff(e.onset) / TICKS_PER_SECOND),
    "duration": Quantity("duration in seconds", SECONDS, lambda e: e.duration / TICKS_PER_SECOND),
}


def histogram(excerpts: Sequence[Excerpt], quantity: Quantity) -> NDArray[np.float64]:
    """Number of notes in each bin of the quantity, over all excerpts."""
    values = np.concatenate([quantity.values(excerpt) for excerpt in excerpts])
    inside = np.clip(values, quantity.edges[0] + 1e-9, quantity.edges[-1] - 1e-9)
    return np.histogram(inside, quantity.edges)[0].astype(np.float64)


def overlap_area(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area under both histograms, each normalised to 1: 1 if they are identical, 0 if they share no bin.

    Bins are the last dimension of both counts, whose other dimensions broadcast.
    """
    shares = (counts / counts.sum(axis=-1, keepdims=True) for counts in (first, second))
    return np.minimum(*shares).sum(axis=-1)


def divergence(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kullback-Leibler divergence of the first histogram from the second, in nats; arguments as in `overlap_area`."""
    p, q = (counts / counts.sum(axis=-1, keepdims=True) for counts in (first + PRIOR, second + PRIOR))
    return (p * np.log(p / q)).sum(axis=-1)


def entropy_bits(counts: NDArray[np.int64]) -> float:
    """Entropy of a histogram in bits."""
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares, out=np.zeros(len(shares)), where=shares > 0)).sum() / np.log(2))


@dataclass(frozen=True)
class Window:
    """Metrics of a window of time."""

    pitch_class_entropy: float  # bits, over the pitch classes of the note-ons; at most 3.58, for twelve equal classes
    polyphony: float  # mean number of sounding notes, over the time in which any sounds
    density: float  # notes per second


WINDOW_METRICS = {
    "pitch_class_entropy": "pitch-class entropy, bits",
    "polyphony": "notes that sound at once",
    "density": "notes per second",
}


def time_windows(excerpts: Sequence[Excerpt], seconds: float) -> list[Window]:
    """Metrics of consecutive windows of each excerpt, without the incomplete last one and those without an onset."""
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
            found.append(Window(entropy_bits(classes), polyphony, float(struck.sum() / seconds)))
    return found
