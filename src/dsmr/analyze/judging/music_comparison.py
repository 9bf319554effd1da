"""Compare sets of generated excerpts with a reference: one row of metrics per set.

The distance between two histograms depends on the number of excerpts in them. Every set is therefore reported with a
floor: the distance that as many excerpts of the reference reach. D draws, K excerpts of a set, N of the reference,
B bins.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsmr.analyze.judging.copying import longest_shared
from dsmr.analyze.judging.excerpts import Excerpt
from dsmr.analyze.judging.features import QUANTITIES, WINDOW_METRICS, divergence, histogram, overlap_area, time_windows
from dsmr.results.tables import table_lines

Corpus = Sequence[Any]
Histograms = Mapping[str, NDArray[np.float64]]
REFERENCE = "reference"
NUM_DRAWS = 1000
RANGE = (0.025, 0.975)
FEWEST = 20  # excerpts of a reference; with fewer, real excerpts fall outside their floor too often
MEASURES = {"overlap": overlap_area, "kl": divergence}


def set_metrics(excerpts: Sequence[Excerpt], window_seconds: float, corpus: Corpus) -> dict[str, Any]:
    """Metrics of one set by itself; copying is measured unless the corpus of training pitches is empty."""
    parts = time_windows(excerpts, window_seconds)
    metrics: dict[str, Any] = {
        "pieces": len(excerpts),
        "notes": sum(len(excerpt.onset) for excerpt in excerpts),
        "seconds": sum(excerpt.seconds for excerpt in excerpts),
        "windows": len(parts),
        "invalid_events": sum(excerpt.invalid for excerpt in excerpts),
    }
    for name in WINDOW_METRICS:
        values = np.asarray([getattr(part, name) for part in parts])
        if len(values):
            metrics[name] = {"mean": float(values.mean()), "sd": float(values.std()), "values": values.tolist()}
    if corpus:
        for name, transposed in (("longest_shared_run", False), ("longest_shared_run_transposed", True)):
            runs = longest_shared([excerpt.pitch for excerpt in excerpts], corpus, transposed=transposed)
            metrics[name] = {"median": float(np.median(runs)), "max": max(runs)}
    metrics["histograms"] = {name: histogram(excerpts, quantity).tolist() for name, quantity in QUANTITIES.items()}
    return metrics


def by_excerpt(excerpts: Sequence[Excerpt]) -> Histograms:
    """Histograms of each excerpt, (excerpts, B), by quantity."""
    return {name: np.stack([histogram([one], quantity) for one in excerpts]) for name, quantity in QUANTITIES.items()}


def compare_histograms(made: Histograms, real: Histograms) -> dict[str, Any]:
    """Overlap area and divergence of each histogram from the reference, with those of as many real excerpts.

    Each draw takes as many excerpts as the set has from the reference, at random without replacement, and compares
    both them and the set with the rest. Nothing is compared with itself, and a set from the distribution of the
    reference is expected at the mean of its floor. A set of more than half the reference is thinned to half of it at
    random in each draw.

    Sizes are matched by excerpts rather than notes, since the notes of one excerpt are alike: to match the notes of a
    dense set would take more excerpts, and set a floor that real music of that density does not reach.

    The set's histograms are (K, B), the reference's (N, B), with N at least `FEWEST`. Returns `overlap` and `kl` of
    each quantity that the set has, as means over the draws, with their `floor`: mean and `RANGE`.
    """
    num_made, num_real = (len(next(iter(part.values()))) for part in (made, real))
    size, rng = min(num_made, num_real // 2), np.random.default_rng(0)
    drawn_DN, kept_DK = (subsets(rng, num, size) for num in (num_real, num_made))
    found: dict[str, Any] = {}
    for name, real_NB in real.items():
        made_KB = made[name]
        made_DB, drawn_DB, rest_DB = kept_DK @ made_KB, drawn_DN @ real_NB, (1 - drawn_DN) @ real_NB
        is_some_D, is_real_D = (part_DB.sum(axis=1) > 0 for part_DB in (made_DB, drawn_DB))
        if not is_some_D.any() or not is_real_D.any():  # an excerpt of one note has no gap between notes
            continue
        floor: dict[str, Any] = {"excerpts": size, "rest": num_real - size, "draws": NUM_DRAWS}
        found[name] = {"floor": floor}
        for measure, measured in MEASURES.items():
            found[name][measure] = float(measured(made_DB[is_some_D], rest_DB[is_some_D]).mean())
            real_D = measured(drawn_DB[is_real_D], rest_DB[is_real_D])
            low, high = np.quantile(real_D, RANGE)
            floor[measure] = {"mean": float(real_D.mean()), "low": float(low), "high": float(high)}
    return found


def subsets(rng: np.random.Generator, num: int, size: int) -> NDArray[np.float64]:
    """Draw `size` of `num` items without replacement, `NUM_DRAWS` times: 1 where drawn, else 0, (D, num)."""
    order_DN = np.argsort(rng.random((NUM_DRAWS, num)), axis=1)
    return (order_DN < size).astype(np.float64)


def compare_sets(
    sets: Mapping[str, Sequence[Excerpt]], reference: Sequence[Excerpt], window_seconds: float, corpus: Corpus
) -> dict[str, dict[str, Any]]:
    """Rows of the reference and of all sets, which are compared with it if it has `FEWEST` excerpts."""
    rows, real = {REFERENCE: set_metrics(reference, window_seconds, corpus)}, by_excerpt(reference)
    for name, excerpts in sets.items():
        rows[name] = set_metrics(excerpts, window_seconds, corpus)
        if len(reference) >= FEWEST:
            rows[name]["against_reference"] = compare_histograms(by_excerpt(excerpts), real)
    return rows


def judgement_table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rows as a Markdown table, with the floor below each set."""
    compared = [f"{name} {kind}" for name in ("pitch", "velocity", "inter-onset", "duration") for kind in ("OA", "KL")]
    table = [["set", "pieces", "notes", *WINDOW_METRICS.values(), *compared, "longest run", "transposed", "invalid"]]
    for name, row in rows.items():
        against = row.get("against_reference", {})
        cells = [name, f"{row['pieces']}", f"{row['notes']:,}"]
        cells += [f"{row[f]['mean']:.2f} ± {row[f]['sd']:.2f}" if f in row else "" for f in WINDOW_METRICS]
        found = [against.get(quantity) for quantity in QUANTITIES]
        cells += [f"{one[measure]:.2f}" if one else "" for one in found for measure in MEASURES]
        for kind in ("longest_shared_run", "longest_shared_run_transposed"):
            cells.append(f"{row[kind]['median']:.0f} (max {row[kind]['max']})" if kind in row else "")
        table.append([*cells, str(row["invalid_events"])])
        if against:
            floors = [one["floor"][measure] if one else None for one in found for measure in MEASURES]
            num_real = next(one["floor"]["excerpts"] for one in found if one)
            cells = ["as many real ones", str(num_real), "", *("" for _ in WINDOW_METRICS)]
            cells += [f"{one['mean']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" if one else "" for one in floors]
            table.append([*cells, "", "", ""])
    return table_lines(table)
