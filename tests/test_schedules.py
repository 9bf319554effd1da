"""Schedules: the same shapes by different words, budgets spent to the token, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmr.model import Ascending, Binary, Descending, Full, Schedule, TwoScale, Uniform
from dsmr.model.schedules import expand_horizons

SHAPES = [
    Full(),
    Uniform(),
    TwoScale(),
    TwoScale(placement="upper"),
    TwoScale(placement="interleaved", num_long=3),
    Binary(),
    Binary(layers=(0, 5, 11)),
    Ascending(),
    Ascending(growth="geometric"),
    Descending(),
    Descending(growth="geometric"),
]


def test_schedules_spend_their_budget() -> None:
    assert expand_horizons(Full(), 12) == (4096,) * 12
    assert expand_horizons(TwoScale(), 12) == expand_horizons("2x3584+10x512", 12)
    assert (
        sum(expand_horizons(TwoScale(), 12))
        == sum(expand_horizons(Uniform(), 12))
        == sum(expand_horizons(Full(), 12)) // 4
        == 12_288
    )


def test_placements_of_the_long_layers() -> None:
    assert TwoScale(8, 1, 2, "lower").horizons(6) == (8, 8, 1, 1, 1, 1)
    assert TwoScale(8, 1, 2, "upper").horizons(6) == (1, 1, 1, 1, 8, 8)
    assert TwoScale(8, 1, 2, "interleaved").horizons(6) == (8, 1, 1, 8, 1, 1)
    assert TwoScale(8, 8, 2).horizons(6) == Uniform(8).horizons(6)


def test_two_scale_with_equal_windows_and_binary_with_all_layers_are_uniform() -> None:
    for placement in ("lower", "upper", "interleaved"):
        assert TwoScale(512, 512, 2, placement).horizons(12) == Uniform(512).horizons(12)
        assert Binary(512, 12, placement).horizons(12) == Uniform(512).horizons(12)
    assert Binary(512, tuple(range(12))).horizons(12) == Uniform(512).horizons(12)
    assert Ascending(512, 512).horizons(12) == Uniform(512).horizons(12)


def test_binary_keeps_the_chosen_layers_and_nothing_else() -> None:
    assert Binary(8, 2).horizons(5) == (8, 8, 0, 0, 0)
    assert Binary(8, 2, "upper").horizons(5) == (0, 0, 0, 8, 8)
    assert Binary(8, 2, "interleaved").horizons(5) == (8, 0, 8, 0, 0)
    assert Binary(8, (4, 1)).horizons(5) == (0, 8, 0, 0, 8)
    assert Binary(8, 0).horizons(5) == (0,) * 5


def test_progressive_caps_grow_from_end_to_end() -> None:
    assert Ascending(1, 4, block=1).horizons(4) == (1, 2, 3, 4)
    assert Ascending(1, 8, "geometric", block=1).horizons(4) == (1, 2, 4, 8)
    assert Descending(1, 8, "geometric", block=1).horizons(4) == (8, 4, 2, 1)
    assert Descending(0, 6, block=2).horizons(4) == (6, 4, 2, 0)
    assert Ascending().horizons(1) == (128,)
    assert sum(Ascending().horizons(12)) == sum(Descending().horizons(12)) == 12_288


@pytest.mark.parametrize("schedule", SHAPES, ids=str)
@given(blocks=st.integers(0, 800), num_layers=st.integers(12, 24))
def test_a_fitted_schedule_spends_its_budget_to_the_token_or_names_budgets_that_can_be_spent(
    schedule: Schedule, blocks: int, num_layers: int
) -> None:
    budget = 64 * blocks
    refused = refusal(schedule, budget, num_layers)
    if refused:
        nearest = [int(word) for word in refused.partition("it can spend")[2].split(" or ")]
        assert not any(refusal(schedule, other, num_layers) for other in nearest)
        return
    horizons = schedule.fitted(budget, block=64).horizons(num_layers)
    assert sum(horizons) == budget
    assert not any(horizon % 64 for horizon in horizons)
    shape = schedule.horizons(num_layers)
    pairs = [(i, j) for i in range(num_layers) for j in range(num_layers) if shape[i] < shape[j]]
    assert all(horizons[i] <= horizons[j] for i, j in pairs), "another shape"


def refusal(schedule: Schedule, budget: int, num_layers: int) -> str:
    """Why a budget cannot be spent; empty where it can."""
    try:
        schedule.fitted(budget, block=64).horizons(num_layers)
    except ValueError as error:
        return str(error)
    return ""


def test_a_fitted_schedule_of_its_own_budget_is_itself() -> None:
    for schedule in SHAPES:
        horizons = schedule.horizons(12)
        assert schedule.fitted(sum(horizons), block=1).horizons(12) == horizons


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (TwoScale(num_long=5), "0 to 4"),
        (TwoScale(long=1, short=2), "swap"),
        (TwoScale(placement="middle"), "lower, upper, interleaved"),
        (TwoScale().fitted(12_288, block=0), "block is 0"),
        (TwoScale(num_long=4, short=0).fitted(1000), "it can spend 512 or 1024"),
        (TwoScale(num_long=0).fitted(1000), "it can spend 2048"),
        (Binary(layers=0).fitted(1000), "it can spend 0"),
        (TwoScale(short=512).fitted(1000), "it can spend 2048"),
        (Uniform().fitted(1000), "it can spend 512 or 1024"),
        (Ascending().fitted(1000), "it can spend 896 or 1024"),
        (Binary(layers=5), "0 to 4"),
        (Binary(layers=(0, 4)), r"from 0 \(bottom layer\) to 3 \(top layer\)"),
        (Binary(layers=(0, 0)), "different numbers"),
        (Binary(layers=(0, 1), placement="upper"), "leave out placement"),
        (Ascending(8, 4), "at least shortest"),
        (Ascending(0, 4, "geometric"), "shortest at least 1"),
        (Descending(1, 4, "cubic"), "linear, geometric"),
    ],
    ids=str,
)
def test_what_a_schedule_cannot_do_is_refused_with_what_would_be_legal(schedule: Schedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule.horizons(4)


def test_a_network_without_horizons_is_told_so() -> None:
    with pytest.raises(ValueError, match="have 2 layers, but num_layers is 3"):
        expand_horizons((8, 8), 3)
