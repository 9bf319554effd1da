"""Compare candidates for a 95 % interval over pieces by simulation: how often does each cover the truth.

    python experiments/intervals/run.py [--pieces TWO_SCALE.csv MEMORYLESS.csv] [--repeats 4000] [--output FOLDER]

Test sets of P pieces are drawn from a population whose ratio of sums (nats per note) is known, and each candidate's
interval either covers it or does not. Lengths are log-normal with MAESTRO's spread. Losses per note are standardized:
coverage does not depend on their level and scale, so one population covers both a metric and a paired difference.
Perplexity is exp of such a ratio and is covered equally often. `--pieces` adds
populations of real pieces: those of two tables of `dsmr validate --pieces`, drawn with replacement.

Prints the tables of README.md and writes `results.json`.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from dsmr.benchmark.machine import current_commit, hardware_info, package_versions
from dsmr.results.bootstrap import LEVEL, MIN_PIECES, bootstrap_counts, interval_ends, studentized_draws
from dsmr.results.piece_table import PieceTable

HERE = Path(__file__).resolve().parent
NUM_PIECES = (5, 6, 8, 10, 11, 12, 15, 18, 35, 70, 137)
LOG_MEAN, LOG_SD = 8.1, 0.75  # of MAESTRO's notes per piece: 0.74 in train, 0.78 in validation, 0.70 in test
AT_ONCE = 200  # test sets
TAIL = (1 - LEVEL) / 2
FLOAT = NDArray[np.float64]
Sample = Callable[[np.random.Generator, int, int], tuple[FLOAT, FLOAT]]
Ends = tuple[FLOAT, FLOAT]


@dataclass(frozen=True)
class Population:
    """Population that test sets are drawn from.

    Attributes:
        sample: draws `over_NP` and `under_NP`, given N and P.
        truth: `E[over] / E[under]`.
        is_stress: left out of the criterion, since no candidate holds there with few pieces.
    """

    sample: Sample
    truth: float
    is_stress: bool = False


def normal(rng: np.random.Generator, shape: tuple[int, int]) -> FLOAT:
    return rng.standard_normal(shape)


def skewed(rng: np.random.Generator, shape: tuple[int, int]) -> FLOAT:
    """Draw gamma noise with a skewness of 1.3, that of a trigram's losses on MAESTRO."""
    return (rng.gamma(2.5, size=shape) - 2.5) / np.sqrt(2.5)


def heavy(rng: np.random.Generator, shape: tuple[int, int]) -> FLOAT:
    return rng.standard_t(5, size=shape) / np.sqrt(5 / 3)


def correlated(noise: Callable[..., FLOAT], rho: float, *, is_stress: bool = False) -> Population:
    """Draw losses per note of mean 0 and variance 1, with correlation `rho` to the logarithm of the length."""

    def sample(rng: np.random.Generator, num: int, num_pieces: int) -> tuple[FLOAT, FLOAT]:
        length_NP = rng.standard_normal((num, num_pieces))
        loss_NP = rho * length_NP + np.sqrt(1 - rho**2) * noise(rng, length_NP.shape)
        under_NP = np.exp(LOG_MEAN + LOG_SD * length_NP)
        return loss_NP * under_NP, under_NP

    return Population(sample, rho * LOG_SD, is_stress)


def in_long_pieces(share: float) -> Population:
    """Draw paired differences of 0, except in the longest `share` of pieces: 0.1 with a spread of 0.1."""
    least = -ndtri(share)

    def sample(rng: np.random.Generator, num: int, num_pieces: int) -> tuple[FLOAT, FLOAT]:
        length_NP = rng.standard_normal((num, num_pieces))
        loss_NP = np.where(length_NP > least, 0.1 + 0.1 * rng.standard_normal(length_NP.shape), 0.0)
        under_NP = np.exp(LOG_MEAN + LOG_SD * length_NP)
        return loss_NP * under_NP, under_NP

    return Population(sample, 0.1 * float(ndtr(LOG_SD - least)))


def beyond_horizon() -> Population:
    """Draw paired differences in the notes beyond the median length only: 0.1 per note, with a spread of 0.05."""

    def sample(rng: np.random.Generator, num: int, num_pieces: int) -> tuple[FLOAT, FLOAT]:
        under_NP = np.exp(LOG_MEAN + LOG_SD * rng.standard_normal((num, num_pieces)))
        beyond_NP = np.maximum(under_NP - np.exp(LOG_MEAN), 0)
        return beyond_NP * (0.1 + 0.05 * rng.standard_normal(under_NP.shape)), under_NP

    mean = np.exp(LOG_SD**2 / 2)  # of lengths in units of the median
    return Population(sample, 0.1 * float(mean * ndtr(LOG_SD) - 0.5) / float(mean))


def real(over_P: FLOAT, under_P: FLOAT) -> Population:
    def sample(rng: np.random.Generator, num: int, num_pieces: int) -> tuple[FLOAT, FLOAT]:
        drawn_NP = rng.integers(0, len(under_P), (num, num_pieces))
        return over_P[drawn_NP], under_P[drawn_NP]

    return Population(sample, float(over_P.sum() / under_P.sum()))


POPULATIONS = {
    "independent of length, normal": correlated(normal, 0.0),
    "independent, skewed": correlated(skewed, 0.0),
    "independent, heavy tails": correlated(heavy, 0.0),
    "shorter pieces are worse (-0.3), skewed": correlated(skewed, -0.3),
    "longer pieces are worse (+0.3), skewed": correlated(skewed, 0.3),
    "correlation 0.5, normal": correlated(normal, 0.5),
    "only the longest half differs": in_long_pieces(0.5),
    "only the longest 30 % differ": in_long_pieces(0.3),
    "differs beyond the median length": beyond_horizon(),
    "correlation +0.5, skewed": correlated(skewed, 0.5, is_stress=True),
    "correlation 0.8, normal": correlated(normal, 0.8, is_stress=True),
}


def off(over_NP: FLOAT, under_NP: FLOAT) -> tuple[FLOAT, FLOAT, FLOAT]:
    """Return the ratio, the deviation of each piece from it, and each piece's share of all notes."""
    total_N1 = under_NP.sum(axis=1, keepdims=True)
    value_N1 = over_NP.sum(axis=1, keepdims=True) / total_N1
    return value_N1[:, 0], (over_NP - value_N1 * under_NP) / total_N1, under_NP / total_N1


def percentile(over_NP: FLOAT, under_NP: FLOAT) -> Ends:
    """Percentile bootstrap, used before."""
    drawn_PD = bootstrap_counts(over_NP.shape[1]).T
    low_N, high_N = np.quantile((over_NP @ drawn_PD) / (under_NP @ drawn_PD), [TAIL, 1 - TAIL], axis=1)
    return low_N, high_N


def bca(over_NP: FLOAT, under_NP: FLOAT) -> Ends:
    """Bias-corrected and accelerated bootstrap, as in scipy.stats.bootstrap, for many samples at once."""
    drawn_PD = bootstrap_counts(over_NP.shape[1]).T
    value_N, _, _ = off(over_NP, under_NP)
    values_ND = np.sort((over_NP @ drawn_PD) / (under_NP @ drawn_PD), axis=1)
    below_N = ((values_ND < value_N[:, None]).mean(axis=1) + (values_ND <= value_N[:, None]).mean(axis=1)) / 2
    left_out_NP = (over_NP.sum(1, keepdims=True) - over_NP) / (under_NP.sum(1, keepdims=True) - under_NP)
    moved_NP = left_out_NP.mean(axis=1, keepdims=True) - left_out_NP
    with np.errstate(invalid="ignore"):
        acceleration_N = np.nan_to_num((moved_NP**3).sum(1) / (6 * (moved_NP**2).sum(1) ** 1.5))
    bias_N, last = ndtri(np.clip(below_N, 1e-4, 1 - 1e-4)), values_ND.shape[1] - 1
    found = []
    for z in (ndtri(TAIL), -ndtri(TAIL)):
        place_N = ndtr(bias_N + (bias_N + z) / (1 - acceleration_N * (bias_N + z))) * last
        found.append(np.take_along_axis(values_ND, np.rint(place_N).astype(int)[:, None], 1)[:, 0])
    return found[0], found[1]


def bootstrap_t(over_NP: FLOAT, under_NP: FLOAT) -> Ends:
    """Studentized bootstrap, equal tails."""
    value_N, off_NP, share_NP = off(over_NP, under_NP)
    t_ND, error_N = studentized_draws(off_NP, share_NP), np.sqrt((off_NP**2).sum(axis=1))
    rank = round(TAIL * (t_ND.shape[1] + 1))
    t_ND.partition((rank - 1, t_ND.shape[1] - rank), axis=1)
    return value_N - t_ND[:, -rank] * error_N, value_N - t_ND[:, rank - 1] * error_N


def symmetric_bootstrap_t(over_NP: FLOAT, under_NP: FLOAT) -> Ends:
    """Studentized bootstrap of the absolute difference."""
    value_N, off_NP, share_NP = off(over_NP, under_NP)
    t_ND, error_N = np.abs(studentized_draws(off_NP, share_NP)), np.sqrt((off_NP**2).sum(axis=1))
    rank = round(2 * TAIL * (t_ND.shape[1] + 1))
    t_ND.partition(t_ND.shape[1] - rank, axis=1)
    half_N = t_ND[:, -rank] * error_N
    return value_N - half_N, value_N + half_N


def plain_t(over_NP: FLOAT, under_NP: FLOAT) -> Ends:
    """Linearized standard error, P - 1 degrees of freedom."""
    value_N, off_NP, _ = off(over_NP, under_NP)
    num_pieces = over_NP.shape[1]
    half_N = stdtrit(num_pieces - 1, 1 - TAIL) * np.sqrt(num_pieces / (num_pieces - 1) * (off_NP**2).sum(axis=1))
    return value_N - half_N, value_N + half_N


def effective_t(over_NP: FLOAT, under_NP: FLOAT) -> Ends:
    """Jackknife standard error, effective number of pieces less one degrees of freedom."""
    value_N, off_NP, share_NP = off(over_NP, under_NP)
    error_N = np.sqrt((1 - 1 / over_NP.shape[1]) * ((off_NP / (1 - share_NP)) ** 2).sum(axis=1))
    half_N = stdtrit(np.maximum(1 / (share_NP**2).sum(axis=1) - 1, 1), 1 - TAIL) * error_N
    return value_N - half_N, value_N + half_N


CANDIDATES: dict[str, Callable[[FLOAT, FLOAT], Ends]] = {
    "percentile": percentile,
    "BCa": bca,
    "bootstrap-t": bootstrap_t,
    "symmetric bootstrap-t": symmetric_bootstrap_t,
    "t, P - 1": plain_t,
    "t, effective pieces": effective_t,
    "chosen": interval_ends,
}


def real_populations(first: Path, second: Path) -> dict[str, Population]:
    """Build populations of a metric, a perplexity and a paired difference from the tables of two models."""
    a, b = PieceTable.read(first), PieceTable.read(second)
    b = b.select(a.names)
    return {
        "real pieces, nats per note": real(a.nll_P, a.notes_P),
        "real pieces, perplexity": real(a.nll_P, a.tokens_P),
        "real pieces, paired difference": real(a.nll_P - b.nll_P, a.notes_P),
        "real pieces, nats per token of time": real(
            *(part[:, a.families.index("time")] for part in (a.nll_PF, a.tokens_PF))
        ),
    }


def measure(population: Population, num_pieces: int, repeats: int) -> dict[str, dict[str, float]]:
    """Measure how often each candidate returns an interval, how often that covers the truth, and its width."""
    rng = np.random.default_rng([num_pieces, 1])
    found: dict[str, list[FLOAT]] = {name: [] for name in CANDIDATES}
    for _ in range(repeats // AT_ONCE):
        over_NP, under_NP = population.sample(rng, AT_ONCE, num_pieces)
        for name, candidate in CANDIDATES.items():
            found[name].append(np.stack(candidate(over_NP, under_NP)))
    coverage = {}
    for name, parts in found.items():
        low_N, high_N = np.concatenate(parts, axis=1)
        given_N = np.isfinite(low_N) & np.isfinite(high_N)
        above, below = (low_N > population.truth)[given_N].mean(), (high_N < population.truth)[given_N].mean()
        coverage[name] = {
            "given": float(given_N.mean()),
            "covers": float(1 - above - below),
            "truth_below": float(above),
            "truth_above": float(below),
            "median_width": float(np.median((high_N - low_N)[given_N])),
        }
    return coverage


def table(rows: Mapping[str, Mapping[int, float]], title: str) -> str:
    """Format percentages by number of pieces as a Markdown table."""
    lines = [f"| {title} | " + " | ".join(map(str, NUM_PIECES)) + " |", "|---" * (len(NUM_PIECES) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * row[p]:.1f}" for p in NUM_PIECES) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=Path, nargs=2, help="tables of dsmr validate --pieces of two models")
    parser.add_argument("--repeats", type=int, default=4000, help="test sets of each size from each population")
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args()
    populations = POPULATIONS | (real_populations(*options.pieces) if options.pieces else {})
    found: dict[str, Any] = {}
    for name, population in populations.items():
        found[name] = {p: measure(population, p, options.repeats) for p in NUM_PIECES}
        print(f"measured: {name}", flush=True)
    usual = [name for name, population in populations.items() if not population.is_stress]
    worst = {c: {p: min(found[n][p][c]["covers"] for n in usual) for p in NUM_PIECES} for c in CANDIDATES}
    mean = {c: {p: float(np.mean([found[n][p][c]["covers"] for n in usual])) for p in NUM_PIECES} for c in CANDIDATES}
    own = {n: {p: found[n][p]["chosen"]["covers"] for p in NUM_PIECES} for n in found}
    given = {n: {p: found[n][p]["chosen"]["given"] for p in NUM_PIECES} for n in found}
    width = {
        c: {
            p: float(
                np.mean([found[n][p][c]["median_width"] / found[n][p]["percentile"]["median_width"] for n in usual])
            )
            for p in NUM_PIECES
        }
        for c in CANDIDATES
    }
    for rows, title in (
        (worst, "least coverage, %"),
        (mean, "mean coverage, %"),
        (width, "width, % of percentile's"),
        (own, "the chosen one, by population"),
        (given, "share in which it is given, %"),
    ):
        print("\n" + table(rows, title))
    result = {
        "command": "python experiments/intervals/run.py --pieces two_scale.csv memoryless.csv",
        "commit": current_commit(),
        "seed": 1,
        "repeats": options.repeats,
        "level": LEVEL,
        "fewest": MIN_PIECES,
        "stress": [name for name, population in populations.items() if population.is_stress],
        "hardware": hardware_info(torch.device("cpu")),
        "versions": package_versions(),
        "populations": {
            name: {
                str(p): {c: {k: round(v, 5) for k, v in f.items()} for c, f in by.items()} for p, by in sizes.items()
            }
            for name, sizes in found.items()
        },
    }
    (options.output / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
