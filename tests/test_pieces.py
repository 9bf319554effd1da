"""Results by piece: sums, intervals, and who is better."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dsmr.metrics import PieceNLL, PositionPerplexity
from dsmr.pieces import Interval, PieceTable, average, compare, ratio
from dsmr.report.collect import Run
from dsmr.report.paired import by_seed, differences, groups, shared_name

FAMILIES = ("pitch", "end", "time", "velocity", "other")


def table(nll_P: np.ndarray, notes_P: np.ndarray, names: list[str] | None = None) -> PieceTable:
    """All nats in the notes, all at the beginning."""
    num_pieces = len(nll_P)
    nll_PF, tokens_PF = np.zeros((num_pieces, 5)), np.zeros((num_pieces, 5))
    nll_PF[:, 0], tokens_PF[:, 0] = nll_P, notes_P
    own = tuple(names or [f"piece {p}" for p in range(num_pieces)])
    return PieceTable(own, np.ones(num_pieces), FAMILIES, nll_PF, tokens_PF, (0,), nll_P[:, None], notes_P[:, None])


def test_every_token_is_counted_once_by_piece_stretch_and_family() -> None:
    draws = torch.Generator().manual_seed(0)
    metric, wanted_nll, wanted_tokens = PieceNLL(4, 3), np.zeros((4, 12, 3)), np.zeros((4, 12, 3))
    for first in (1, 65, 129, 193, 257):
        nll_BT, family_BT = torch.rand(3, 64, generator=draws), torch.randint(0, 3, (3, 64), generator=draws)
        is_real_BT = torch.rand(3, 64, generator=draws) < 0.9
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
    draws = np.random.default_rng(0)
    parts = draws.uniform(1, 9, (3, 5)), draws.integers(1, 90, (3, 5)).astype(float)
    stretches = draws.uniform(1, 9, (3, 2)), draws.integers(1, 90, (3, 2)).astype(float)
    names = ("2004/a, b.midi", 'say "hm"\n.mid', "Füße.mid")
    made = PieceTable(names, np.array([1.5, 2.25, 3.125]), FAMILIES, *parts, (0, 128), *stretches)
    made.write(tmp_path / "pieces.csv")
    back = PieceTable.read(tmp_path / "pieces.csv")
    assert (back.names, back.families, back.starts) == (made.names, made.families, made.starts)
    for name in ("seconds_P", "nll_PF", "tokens_PF", "nll_PK", "tokens_PK"):
        np.testing.assert_array_equal(getattr(back, name), getattr(made, name))
    (tmp_path / "pieces.csv").write_text("step,train/nll\n1,2\n")
    with pytest.raises(ValueError, match="no table of pieces"):
        PieceTable.read(tmp_path / "pieces.csv")


def test_intervals_hold_as_often_as_they_say() -> None:
    held, widths = 0, []
    for seed in range(200):
        draws = np.random.default_rng(seed)
        notes_P = draws.integers(100, 2000, 60).astype(float)
        found = ratio(notes_P * draws.normal(12, 1.5, 60), notes_P)
        assert found is not None
        held += found.low <= 12 <= found.high
        widths.append(found.high - found.low)
    assert 0.88 <= held / 200 <= 0.985
    # of a mean weighted by notes: 1.96 sigma sqrt(sum w^2)
    assert 0.8 < np.mean(widths) / (2 * 1.96 * 1.5 * np.sqrt(1.27 / 60)) < 1.2
    assert ratio(np.ones(3), np.zeros(3)) is None
    perplexity = ratio(np.full(9, 30.0), np.full(9, 10.0), is_exp=True)
    assert perplexity is not None
    assert (perplexity.value, perplexity.low, perplexity.high) == pytest.approx((np.exp(3),) * 3)


def test_pairs_tell_what_single_figures_cannot() -> None:
    draws = np.random.default_rng(1)
    notes_P = draws.integers(100, 2000, 60).astype(float)
    level_P = draws.normal(12, 2, 60)
    worse, better = table(notes_P * (level_P + 0.05), notes_P), table(notes_P * level_P, notes_P)
    found = compare("a", "b", worse, better)
    assert found.difference.value == pytest.approx(0.05)
    assert str(found).startswith("b is better than a by 0.050 nats per note [0.050, 0.050], on 60 pieces")
    assert str(compare("b", "a", better, worse)).startswith("b is better than a by 0.050")
    assert (found.wins, compare("b", "a", better, worse).wins) == (0, 60)
    noisy = table(notes_P * (level_P + draws.normal(0, 0.5, 60)), notes_P)
    assert str(compare("a", "b", noisy, better)).startswith("cannot tell a from b: ")
    few = table(notes_P[:3] * level_P[:3], notes_P[:3])
    assert "too few" in str(compare("a", "b", few, better))


def test_only_pieces_of_both_are_compared() -> None:
    a = table(np.array([10.0, 20.0, 30.0]), np.array([1.0, 2.0, 3.0]), ["x", "y", "z"])
    b = table(np.array([33.0, 10.0]), np.array([3.0, 1.0]), ["z", "x"])
    found = compare("a", "b", a, b)
    assert (found.num_pieces, found.difference.value) == (2, pytest.approx(-3 / 4))
    with pytest.raises(ValueError, match="different pieces"):
        compare("a", "b", a, table(np.array([1.0]), np.array([1.0]), ["w"]))
    with pytest.raises(ValueError, match="different notes"):
        compare("a", "b", a, table(np.array([1.0]), np.array([9.0]), ["x"]))
    mean = average([a, b])
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
    first, second = groups([*b, *a])
    assert (first.name, first.label, list(first.tables)) == ("a", "a (2 seeds)", ["0", "1"])
    assert (second.name, second.label, list(second.tables)) == ("b", "b (2 seeds)", ["0", "2"])
    assert by_seed(first, second) == {"0": pytest.approx(-1.0)}
    ((difference,), _) = differences([first, second])
    assert difference.comparison.difference.value == pytest.approx(-2.5)
    assert "seed by seed" not in str(difference)
    ((difference,), _) = differences(groups([*a, *b, scored("b_seed1", 2, 1, 8.0)]))
    assert str(difference).endswith("seed by seed a has -1.000 (0), -3.000 (1)")


def test_a_seed_counts_once_and_one_of_the_data_is_another() -> None:
    twice = [scored("a_seed0", 1, 0, 1.0), scored("a_seed0_again", 1, 0, 4.0)]
    (group,) = groups(twice)
    assert (group.label, list(group.tables)) == ("a_seed0", ["0"])
    assert group.table.nll_P.sum() == pytest.approx(120.0)
    (group,) = groups([scored("a", 1, 0, 1.0), scored("b", 1, 0, 2.0, data_seed=3), scored("c", 1, 3, 2.0)])
    assert list(group.tables) == ["0", "0, data 3", "3"]
    assert len(groups([twice[0], scored("other", 1, 0, 1.0, piece="q")])) == 2


def test_few_pieces_are_marked_whatever_the_spelling() -> None:
    found = Interval(1.0, -0.5, 2.0, 4)
    assert str(found) == f"{found}" == "1.000 [-0.500, 2.000] (4 pieces only)"
    assert f"{found:+.4f}" == "+1.0000 [-0.5000, +2.0000] (4 pieces only)"
    assert f"{Interval(1.0, -0.5, 2.0, 10):8.3f}" == "   1.000 [-0.500, 2.000]"
