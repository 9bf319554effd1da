"""Sets of generated excerpts against a reference, as one row of figures each."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsmr.evaluate.copying import longest_shared
from dsmr.evaluate.excerpts import Excerpt
from dsmr.evaluate.features import QUANTITIES, WINDOW_FIGURES, divergence, histogram, overlap_area, windows

Corpus = Sequence[Any]
REFERENCE, HALVES = "reference", "reference, one half against the other"


def describe(excerpts: Sequence[Excerpt], window_seconds: float, corpus: Corpus) -> dict[str, Any]:
    """What a set is like by itself.

    Args:
        excerpts: the set.
        window_seconds: of the windows of time.
        corpus: pitches of the training pieces; empty leaves copying out.
    """
    parts = windows(excerpts, window_seconds)
    figures: dict[str, Any] = {
        "pieces": len(excerpts),
        "notes": sum(len(excerpt.onset) for excerpt in excerpts),
        "seconds": sum(excerpt.seconds for excerpt in excerpts),
        "windows": len(parts),
        "invalid_events": sum(excerpt.invalid for excerpt in excerpts),
    }
    for name in WINDOW_FIGURES:
        values = np.asarray([getattr(part, name) for part in parts])
        if len(values):
            figures[name] = {"mean": float(values.mean()), "sd": float(values.std()), "values": values.tolist()}
    if corpus:
        for name, transposed in (("longest_shared_run", False), ("longest_shared_run_transposed", True)):
            runs = longest_shared([excerpt.pitch for excerpt in excerpts], corpus, transposed=transposed)
            figures[name] = {"median": float(np.median(runs)), "max": max(runs)}
    figures["histograms"] = {name: histogram(excerpts, quantity).tolist() for name, quantity in QUANTITIES.items()}
    return figures


def compare(figures: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """Overlap area and divergence of each histogram from the reference's."""
    found = {}
    for name in QUANTITIES:
        first, second = (np.asarray(one["histograms"][name]) for one in (figures, reference))
        if first.sum() and second.sum():
            found[name] = {"overlap": overlap_area(first, second), "kl": divergence(first, second)}
    return found


def evaluate(
    sets: Mapping[str, Sequence[Excerpt]], reference: Sequence[Excerpt], window_seconds: float, corpus: Corpus
) -> dict[str, dict[str, Any]]:
    """All rows: the reference, one half of it against the other (what chance and other pieces cost), and the sets."""
    rows = {REFERENCE: describe(reference, window_seconds, corpus)}
    halves = [describe(part, window_seconds, ()) for part in (reference[::2], reference[1::2])]
    rows[HALVES] = halves[0] | {"against_reference": compare(*halves)}
    for name, excerpts in sets.items():
        figures = describe(excerpts, window_seconds, corpus)
        rows[name] = figures | {"against_reference": compare(figures, rows[REFERENCE])}
    return rows


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    compared = [f"{name} {kind}" for name in ("pitch", "velocity", "inter-onset", "duration") for kind in ("OA", "KL")]
    names = ["pieces", "notes", *WINDOW_FIGURES.values(), *compared, "longest run", "transposed", "invalid"]
    lines = ["| set | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, row in rows.items():
        cells = [name, f"{row['pieces']}", f"{row['notes']:,}"]
        cells += [f"{row[f]['mean']:.2f} ± {row[f]['sd']:.2f}" if f in row else "" for f in WINDOW_FIGURES]
        for quantity in QUANTITIES:
            found = row.get("against_reference", {}).get(quantity)
            cells += [f"{found['overlap']:.2f}", f"{found['kl']:.2f}"] if found else ["", ""]
        for kind in ("longest_shared_run", "longest_shared_run_transposed"):
            cells.append(f"{row[kind]['median']:.0f} (max {row[kind]['max']})" if kind in row else "")
        lines.append("| " + " | ".join([*cells, str(row["invalid_events"])]) + " |")
    return lines
