"""The one spelling of horizons, the schedules, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmr.attention.visibility import earliest_position, receptive_field
from dsmr.model import PerceiverAR, format_horizons, parse_horizons
from dsmr.model.horizons import TokenRate, check_horizons, describe_horizons, draw_horizons
from dsmr.model.schedules import expand_horizons


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


def test_impossible_horizons_are_refused_with_what_would_be_possible() -> None:
    with pytest.raises(ValueError, match=r"12 layers, but num_layers is 4.*2x3584\+2x512"):
        expand_horizons("2x3584+10x512", 4)
    with pytest.raises(ValueError, match=r"3x8, but|2 layers.*3x8"):
        expand_horizons("1x8+1x8", 3)
    with pytest.raises(ValueError, match="384 or 512"):
        check_horizons((500,), 512, 128)
    with pytest.raises(ValueError, match="segment_length 100"):
        check_horizons((512,), 100, 128)


def test_a_description_names_the_budget_and_the_seconds_of_music_of_the_data() -> None:
    start = "1x3584+1x512 (budget 4,096 tokens"
    assert describe_horizons((3584, 512)) == f"{start}, longest 90 s of music in MAESTRO)"
    assert describe_horizons((3584, 512), TokenRate(20.0)) == f"{start}, longest 179 s of music)"
    assert describe_horizons((3584, 512), None) == f"{start})"


def test_a_picture_tells_the_seconds_of_the_data_or_none() -> None:
    assert (
        draw_horizons((320,), TokenRate(20.0), width=4)
        == "    0 \u2588\u2588\u2588\u2588     320 tokens   16.0 s    8%"
    )
    assert draw_horizons((320,), None, width=4) == "    0 \u2588\u2588\u2588\u2588     320 tokens    8%"


@pytest.mark.parametrize(("rate", "time"), [(TokenRate(20.0), " (16 s of music)"), (None, "")])
def test_a_prefix_is_told_in_the_seconds_of_the_data(rate: TokenRate | None, time: str) -> None:
    network = PerceiverAR(11, 16, prefix_length=320, d_model=16, num_layers=1, num_heads=2)
    assert network.summary(rate) == f"no horizons; a prefix of 320 token ids{time}"
    assert network.summary() == "no horizons; a prefix of 320 token ids (8 s of music in MAESTRO)"


def test_a_picture_has_a_bar_for_each_layer_the_top_one_first() -> None:
    lines = draw_horizons((4096, 1024, 1, 0), width=16).splitlines()
    assert [line.split()[0] for line in lines] == ["3", "2", "1", "0"]
    assert [line.count("\u2588") for line in lines] == [0, 0, 4, 16]
    assert "0 tokens    0.0 s    0%" in lines[0]
    assert "\u258f" in lines[1], "a horizon of one token is seen"
    assert "1,024 tokens   25.7 s   25%" in lines[2]
    assert len({len(line) for line in lines}) == 1
    assert "200%" in draw_horizons((8192, 0))
    assert "0 tokens" in draw_horizons((0, 0))


def test_the_receptive_field_of_two_scale_at_base_size() -> None:
    field = receptive_field((3584,) * 2 + (512,) * 10, 512)
    assert field == (3584, 7168, *(7168 + 512 * layer for layer in range(1, 11)))
    assert receptive_field((3584,) * 2 + (512,) * 10, 512, "sliding")[-1] == 12 * -1 + 12_288
    assert receptive_field((0, 8), 4) == (0, 8)
    assert earliest_position(1023, (0, 512), 512) == 0
    assert earliest_position(1023, (0, 512), 512, "sliding") == 512
