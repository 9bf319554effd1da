"""Results by piece: sums, intervals, and who is better."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from dsmr.cli.outcome import tell_pieces
from dsmr.results.bootstrap import (
    MIN_PIECES,
    NO_INTERVAL,
    Interval,
    bootstrap_counts,
    compare_tables,
    interval_ends,
    ratio_interval,
)
from dsmr.results.comparisons import (
    compare_groups,
    compare_seeds,
    comparison_result,
    comparison_table,
    group_runs,
    shared_name,
)
from dsmr.results.piece_table import PieceTable, average_tables
from dsmr.results.run_plots import plot_positions
from dsmr.results.runs import Run
from dsmr.training.metrics import PieceNLL, PositionPerplexity

FAMILIES = ("pitch", "end", "time", "velocity", "other")


def table(nll_P: np.ndarray, notes_P: np.ndarray, names: list[str] | None = None) -> PieceTable:
    """All nats in the notes, all at the beginning."""
    num_pieces = len(nll_P)
    nll_PF, tokens_PF = np.zeros((num_pieces, 5)), np.zeros((num_pieces, 5))
    nll_PF[:, 0], tokens_PF[:, 0] = nll_P, notes_P
    own = tuple(names or [f"piece {p}" for p in range(num_pieces)])
    return PieceTable(own, np.ones(num_pieces), FAMILIES, nll_PF, tokens_PF, (0,), nll_P[:, None], notes_P[:, None])


def test_every_token_is_counted_once_by_piece_stretch_and_family() -> None:
    rng = torch.Generator().manual_seed(0)
    metric, wanted_nll, wanted_tokens = PieceNLL(4, 3), np.zeros((4, 12, 3)), np.zeros((4, 12, 3))
    for first in (1, 65, 129, 193, 257):
        nll_BT, family_BT = torch.rand(3, 64, generator=rng), torch.randint(0, 3, (3, 64), generator=rng)
        is_real_BT = torch.rand(3, 64, generator=rng) < 0.9
        is_real_BT[:, 0] = True
        piece_B = torch.tensor([2, 0, -1])
        is_real_BT[2] = False  # a lane that ran out
        position_B, microseconds_B = torch.tensor([first, first + 900, 0]), torch.tensor([10, 20, 0])
        metric.update(nll_BT, is_real_BT, piece_B, position_B, family_BT, microseconds_B)
        for lane, place in ((lane, place) for lane in (0, 1) for place in range(64)):
            if is_real_BT[lane, place]:
                position = int(position_B[lane]) + place
                stretch = sum(start <= position for start in PositionPerplexity.STARTS) - 1
                where = (int(piece_B[lane]), stretch, int(family_BT[lane, place]))
                wanted_nll[where] += float(nll_BT[lane, place])
                wanted_tokens[where] += 1
    sums = metric.compute()
    np.testing.assert_allclose(sums["nll_PKF"].numpy(), wanted_nll, rtol=1e-6)
    np.testing.assert_array_equal(sums["tokens_PKF"].numpy(), wanted_tokens)
    assert sums["microseconds_P"].tolist() == [100, 0, 50, 0]


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = rng.uniform(1, 9, (3, 5)), rng.integers(1, 90, (3, 5)).astype(float)
    stretches = rng.uniform(1, 9, (3, 2)), rng.integers(1, 90, (3, 2)).astype(float)
    names = ("2004/a, b.midi", 'say "hm"\n.mid', "Füße.mid")
    made = PieceTable(names, np.array([1.5, 2.25, 3.125]), FAMILIES, *parts, (0, 128), *stretches)
    made.write(tmp_path / "pieces.csv")
    back = PieceTable.read(tmp_path / "pieces.csv")
    assert (back.names, back.families, back.starts) == (made.names, made.families, made.starts)
    for name in ("seconds_P", "nll_PF", "tokens_PF", "nll_PK", "tokens_PK"):
        np.testing.assert_array_equal(getattr(back, name), getattr(made, name))
    (tmp_path / "pieces.csv").write_text("step,train/nll\n1,2\n")
    with pytest.raises(ValueError, match="not a table of pieces"):
        PieceTable.read(tmp_path / "pieces.csv")


def test_intervals_hold_as_often_as_they_say() -> None:
    held, widths = 0, []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        notes_P = rng.integers(100, 2000, 60).astype(float)
        found = ratio_interval(notes_P * rng.normal(12, 1.5, 60), notes_P)
        assert found is not None
        held += found.low <= 12 <= found.high
        widths.append(found.high - found.low)
    assert 0.88 <= held / 200 <= 0.985
    # of a mean weighted by notes: 1.96 sigma sqrt(sum w^2)
    assert 0.8 < np.mean(widths) / (2 * 1.96 * 1.5 * np.sqrt(1.27 / 60)) < 1.2
    assert ratio_interval(np.ones(3), np.zeros(3)) is None
    perplexity = ratio_interval(np.full(19, 30.0), np.full(19, 10.0), is_exp=True)
    assert perplexity is not None
    assert (perplexity.value, perplexity.low, perplexity.high) == pytest.approx((np.exp(3),) * 3)


def normal(rng: np.random.Generator, length_NP: np.ndarray) -> tuple[np.ndarray, float]:
    return rng.standard_normal(length_NP.shape), 0.0


def longer_is_worse(rng: np.random.Generator, length_NP: np.ndarray) -> tuple[np.ndarray, float]:
    return 0.5 * length_NP + np.sqrt(0.75) * rng.standard_normal(length_NP.shape), 0.5 * 0.75


def shorter_is_worse(rng: np.random.Generator, length_NP: np.ndarray) -> tuple[np.ndarray, float]:
    """With skewed noise, as real losses have it."""
    noise_NP = (rng.gamma(2.5, size=length_NP.shape) - 2.5) / np.sqrt(2.5)
    return -0.3 * length_NP + np.sqrt(0.91) * noise_NP, -0.3 * 0.75


def half_differ(rng: np.random.Generator, length_NP: np.ndarray) -> tuple[np.ndarray, float]:
    """A paired difference of two models that are alike on pieces shorter than the median."""
    loss_NP = np.where(length_NP > 0, 0.1 + 0.1 * rng.standard_normal(length_NP.shape), 0.0)
    return loss_NP, 0.1 * 0.7733726476231317  # Phi(0.75): the share of all notes in the longer half


@pytest.mark.parametrize("population", [normal, longer_is_worse, shorter_is_worse, half_differ])
@pytest.mark.parametrize("num_pieces", [MIN_PIECES, 18, 137])
def test_intervals_cover_what_they_claim(population: Callable, num_pieces: int) -> None:
    rng = np.random.default_rng(num_pieces)
    length_NP = rng.standard_normal((800, num_pieces))
    loss_NP, truth = population(rng, length_NP)
    under_NP = np.exp(8.1 + 0.75 * length_NP)  # lengths as in MAESTRO
    low_N, high_N = interval_ends(loss_NP * under_NP, under_NP)
    given_N = np.isfinite(low_N) & np.isfinite(high_N)
    covers = ((low_N <= truth) & (truth <= high_N))[given_N].mean()
    assert 0.925 <= covers <= 0.985
    assert given_N.mean() > (0.9 if population is half_differ else 0.999)
    for over_P, under_P, low, high in zip(loss_NP[:3] * under_NP[:3], under_NP, low_N, high_N, strict=False):
        found = ratio_interval(over_P, under_P)
        assert found is not None
        assert found.ends == (pytest.approx((low, high)) if np.isfinite(high - low) else None)


def test_the_percentile_interval_would_not_pass() -> None:
    rng = np.random.default_rng(0)
    length_NP = rng.standard_normal((800, 18))
    loss_NP, truth = longer_is_worse(rng, length_NP)
    under_NP, drawn_PD = np.exp(8.1 + 0.75 * length_NP), bootstrap_counts(18).T
    values_ND = ((loss_NP * under_NP) @ drawn_PD) / (under_NP @ drawn_PD)
    low_N, high_N = np.quantile(values_ND, [0.025, 0.975], axis=1)
    assert ((low_N <= truth) & (truth <= high_N)).mean() < 0.9


def test_an_interval_is_that_of_its_formulas() -> None:
    rng = np.random.default_rng(3)
    notes_P = np.exp(8.1 + 0.75 * rng.standard_normal(15))
    nats_P = notes_P * rng.normal(12, 1, 15)
    value = nats_P.sum() / notes_P.sum()
    without = [(nats_P.sum() - x) / (notes_P.sum() - n) for x, n in zip(nats_P, notes_P, strict=True)]
    jackknife = np.sqrt(14 / 15 * sum((one - value) ** 2 for one in without))
    by_t = student.ppf(0.975, notes_P.sum() ** 2 / (notes_P**2).sum() - 1) * jackknife

    def error(x_P: np.ndarray, n_P: np.ndarray) -> float:
        return float(np.sqrt(((x_P - x_P.sum() / n_P.sum() * n_P) ** 2).sum()) / n_P.sum())

    t = []
    for drawn_P in bootstrap_counts(15).astype(int):
        rows = np.repeat(np.arange(15), drawn_P)
        t.append((nats_P[rows].sum() / notes_P[rows].sum() - value) / error(nats_P[rows], notes_P[rows]))
    assert len(t) == 3999
    low = min(value - by_t, value - sorted(t)[3899] * error(nats_P, notes_P))
    high = max(value + by_t, value - sorted(t)[99] * error(nats_P, notes_P))
    found = ratio_interval(nats_P, notes_P)
    assert found is not None
    assert found.ends == pytest.approx((low, high))
    perplexity = ratio_interval(nats_P / 5, notes_P, is_exp=True)
    assert perplexity is not None
    assert perplexity.ends == pytest.approx((np.exp(low / 5), np.exp(high / 5)))
    less = ratio_interval(-nats_P, notes_P)
    assert less is not None
    assert less.ends == pytest.approx((-high, -low)), "the same whichever model is named first"


def test_nothing_is_said_where_an_interval_would_not_hold() -> None:
    rng = np.random.default_rng(0)
    notes_P = rng.integers(100, 2000, MIN_PIECES).astype(float)
    nats_P = notes_P * rng.normal(12, 1, MIN_PIECES)
    for num_pieces in range(1, MIN_PIECES):
        found = ratio_interval(nats_P[:num_pieces], notes_P[:num_pieces])
        value = nats_P[:num_pieces].sum() / notes_P[:num_pieces].sum()
        assert found == Interval(pytest.approx(value), None, None, num_pieces)
    found = ratio_interval(nats_P, notes_P)
    assert found is not None
    assert found.ends is not None
    padded = ratio_interval(np.append(nats_P, np.zeros(50)), np.append(notes_P, np.zeros(50)))
    assert padded == found, "pieces that have nothing to say change nothing"
    one_differs = ratio_interval(np.eye(MIN_PIECES)[0], notes_P)
    assert one_differs is not None
    assert one_differs.ends is None, "most draws lack the only piece that differs"
    assert ratio_interval(1e6 * nats_P, notes_P, is_exp=True).ends is None, "perplexity beyond all numbers"


@pytest.mark.parametrize("level", [0.0, 0.05, 12.3])
def test_losses_that_are_all_alike_have_an_interval_without_width(level: float) -> None:
    notes_P = np.random.default_rng(0).integers(1, 20000, 40).astype(float)
    for nats_P in (level * notes_P, (7.7 + level) * notes_P - 7.7 * notes_P):
        found = ratio_interval(nats_P, notes_P)
        assert found is not None
        assert found.ends == pytest.approx((level, level), abs=1e-12)


def test_a_piece_with_nats_but_without_notes_counts_in_the_sum_alone() -> None:
    rng = np.random.default_rng(0)
    notes_P = rng.integers(1, 20000, 40).astype(float)
    nats_P = notes_P * rng.normal(12, 1, 40)
    found = ratio_interval(np.append(nats_P, 5.0), np.append(notes_P, 0.0))
    assert found is not None
    assert (found.value, found.num_pieces) == (pytest.approx((nats_P.sum() + 5) / notes_P.sum()), 40)
    assert found.ends is not None
    assert found.ends == pytest.approx(ratio_interval(nats_P, notes_P).ends, rel=0.02)


def test_paired_differences_show_what_single_values_cannot() -> None:
    rng = np.random.default_rng(1)
    notes_P = rng.integers(100, 2000, 60).astype(float)
    level_P = rng.normal(12, 2, 60)
    worse, better = table(notes_P * (level_P + 0.05), notes_P), table(notes_P * level_P, notes_P)
    found = compare_tables("a", "b", worse, better)
    assert found.difference.value == pytest.approx(0.05)
    assert str(found).startswith("b is better than a by 0.050 nats per note [0.050, 0.050], on 60 pieces")
    assert str(compare_tables("b", "a", better, worse)).startswith("b is better than a by 0.050")
    assert (found.wins, compare_tables("b", "a", better, worse).wins) == (0, 60)
    noisy = table(notes_P * (level_P + rng.normal(0, 0.5, 60)), notes_P)
    assert str(compare_tables("a", "b", noisy, better)).startswith("cannot tell a from b: ")
    few = table(notes_P[:3] * level_P[:3], notes_P[:3])
    assert "too few" in str(compare_tables("a", "b", few, better))


def test_only_pieces_of_both_are_compared() -> None:
    a = table(np.array([10.0, 20.0, 30.0]), np.array([1.0, 2.0, 3.0]), ["x", "y", "z"])
    b = table(np.array([33.0, 10.0]), np.array([3.0, 1.0]), ["z", "x"])
    found = compare_tables("a", "b", a, b)
    assert (found.num_pieces, found.difference.value) == (2, pytest.approx(-3 / 4))
    with pytest.raises(ValueError, match="different pieces"):
        compare_tables("a", "b", a, table(np.array([1.0]), np.array([1.0]), ["w"]))
    with pytest.raises(ValueError, match="different notes"):
        compare_tables("a", "b", a, table(np.array([1.0]), np.array([9.0]), ["x"]))
    mean = average_tables([a, b])
    assert mean.names == ("x", "z")
    assert mean.nll_P.tolist() == [10.0, 31.5]


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (["seed=0,two_scale", "seed=1,two_scale"], "two_scale"),
        (["full-s0"], "full-s0"),
        (["full_seed0", "full_seed1"], "full"),
        (["a", "b"], "a"),
        (["seed=0", "seed=1"], "seed=0"),
        (["a/seed=0", "a/seed=1"], "a"),
        (["seed=0/a", "seed=1/a"], "a"),
        (["x/seed=0/a", "x/seed=1/a"], "x/a"),
    ],
)
def test_seeds_of_one_setting_share_a_name(names: list[str], shared: str) -> None:
    assert shared_name(names) == shared


def scored(name: str, width: int, seed: int, loss: float, *, data_seed: int | None = None, piece: str = "p") -> Run:
    """A run of one setting for each width."""
    data = {"seed": seed if data_seed is None else data_seed}
    config = {"seed_everything": seed, "model": {"width": width}, "data": data, "trainer": {}}
    names = [f"{piece}{number}" for number in range(12)]
    return Run(name, config, [], pieces=table(np.full(12, 10 * loss), np.full(12, 10.0), names))


def test_seeds_are_paired_with_themselves() -> None:
    a = [scored("a_seed0", 1, 0, 1.0), scored("a_seed1", 1, 1, 5.0)]
    b = [scored("b_seed0", 2, 0, 2.0), scored("b_seed2", 2, 2, 9.0)]
    first, second = group_runs([*b, *a])
    assert (first.name, first.label, list(first.tables)) == ("a", "a (2 seeds)", ["0", "1"])
    assert (second.name, second.label, list(second.tables)) == ("b", "b (2 seeds)", ["0", "2"])
    assert compare_seeds(first, second) == {"0": pytest.approx(-1.0)}
    ((difference,), _) = compare_groups([first, second])
    assert difference.comparison.difference.value == pytest.approx(-2.5)
    assert "seed by seed" not in str(difference)
    ((difference,), _) = compare_groups(group_runs([*a, *b, scored("b_seed1", 2, 1, 8.0)]))
    assert str(difference).endswith("seed by seed a has -1.000 (0), -3.000 (1)")


def test_a_seed_counts_once_and_one_of_the_data_is_another() -> None:
    twice = [scored("a_seed0", 1, 0, 1.0), scored("a_seed0_again", 1, 0, 4.0)]
    (group,) = group_runs(twice)
    assert (group.label, list(group.tables)) == ("a_seed0", ["0"])
    assert group.table.nll_P.sum() == pytest.approx(120.0)
    (group,) = group_runs([scored("a", 1, 0, 1.0), scored("b", 1, 0, 2.0, data_seed=3), scored("c", 1, 3, 2.0)])
    assert list(group.tables) == ["0", "0, data 3", "3"]
    assert len(group_runs([twice[0], scored("other", 1, 0, 1.0, piece="q")])) == 2


def test_a_value_without_an_interval_is_formatted_alone() -> None:
    found = Interval(1.0, None, None, 4)
    assert str(found) == f"{found}" == "1.000"
    assert f"{found:+.4f}" == "+1.0000"
    assert f"{Interval(1.0, -0.5, 2.0, 12):8.3f}" == "   1.000 [-0.500, 2.000]"
    assert f"{found:8.3f}" == "   1.000"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_pieces", [1, 5, MIN_PIECES])
def test_whatever_tells_of_intervals_copes_without_and_says_why_once(
    num_pieces: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    notes_P = rng.integers(100, 2000, num_pieces).astype(float)
    tables = [table(notes_P * rng.normal(level, 0.1, num_pieces), notes_P) for level in (2, 3)]
    has_none, times = num_pieces < MIN_PIECES, int(num_pieces < MIN_PIECES)

    result = tell_pieces(tables[0], tmp_path / "pieces.csv")
    found = json.loads(json.dumps(result, allow_nan=False))["intervals"]
    assert (found["perplexity"]["low"] is None) is has_none
    assert found.get("without_interval") == (NO_INTERVAL if has_none else None)
    printed = capsys.readouterr().out
    assert printed.count(NO_INTERVAL) == times
    assert printed.count("[") == (0 if has_none else 4)

    runs = [
        Run(f"run {n}", {"model": {"width": n}, "data": {}, "trainer": {}}, [], pieces=one)
        for n, one in enumerate(tables)
    ]
    lines = comparison_table(group_runs(runs))
    assert "\n".join(lines).count(NO_INTERVAL[1:]) == times
    assert lines[-1].startswith("- cannot tell run 0 from run 1: -" if has_none else "- run 0 is better than run 1")
    assert ("too few" in lines[-1]) is has_none
    paired = json.loads(json.dumps(comparison_result(group_runs(runs)), allow_nan=False))
    (difference,) = paired["differences"]
    assert ((difference["low"], difference["high"]) == (None, None)) is has_none
    assert paired.get("without_interval") == (NO_INTERVAL if has_none else None)
    assert plot_positions(runs, tmp_path / "positions.png")
