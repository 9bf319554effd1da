"""The one spelling of horizons, the schedules, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmr.model import Full, TwoScale, Uniform, format_horizons, parse_horizons
from dsmr.model.horizons import check_horizons, describe
from dsmr.model.schedules import expand


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=24))
def test_spelling_and_reading_are_inverse(horizons: list[int]) -> None:
    assert parse_horizons(format_horizons(horizons)) == tuple(horizons)


def test_horizons_read_bottom_to_top() -> None:
    assert parse_horizons("2x3584+10x512") == (3584,) * 2 + (512,) * 10
    assert parse_horizons("64 + 2x8") == (64, 8, 8)


@pytest.mark.parametrize("text", ["", "2*512", "x512", "2x", "0x512", "2x512+", "-1", "1.5"])
def test_what_is_not_a_spelling_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"2x3584\+10x512"):
        parse_horizons(text)


def test_schedules_spend_their_budget() -> None:
    assert expand(Full(), 12) == (4096,) * 12
    assert expand(TwoScale(), 12) == expand("2x3584+10x512", 12)
    assert sum(expand(TwoScale(), 12)) == sum(expand(Uniform(), 12)) == sum(expand(Full(), 12)) // 4 == 12_288


def test_placements_of_the_long_layers() -> None:
    assert TwoScale(8, 1, 2, "lower").horizons(6) == (8, 8, 1, 1, 1, 1)
    assert TwoScale(8, 1, 2, "upper").horizons(6) == (1, 1, 1, 1, 8, 8)
    assert TwoScale(8, 1, 2, "interleaved").horizons(6) == (8, 1, 1, 8, 1, 1)
    assert TwoScale(8, 8, 2).horizons(6) == Uniform(8).horizons(6)


def test_impossible_horizons_are_refused_with_what_would_be_possible() -> None:
    with pytest.raises(ValueError, match=r"12 layers, but num_layers is 4.*2x3584\+2x512"):
        expand("2x3584+10x512", 4)
    with pytest.raises(ValueError, match=r"3x8, but|2 layers.*3x8"):
        expand("1x8+1x8", 3)
    with pytest.raises(ValueError, match="384 or 512"):
        check_horizons((500,), 512, 128)
    with pytest.raises(ValueError, match="segment_length 100"):
        check_horizons((512,), 100, 128)
    with pytest.raises(ValueError, match="0 to 4"):
        TwoScale(num_long=5).horizons(4)
    with pytest.raises(ValueError, match="swap"):
        TwoScale(long=1, short=2).horizons(4)


def test_a_description_names_the_budget_and_the_seconds_of_music() -> None:
    assert describe((3584, 512)) == "1x3584+1x512 (budget 4,096 tokens, longest 90 s of music)"
