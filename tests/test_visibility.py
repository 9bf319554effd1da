"""Attention visibility: one number per query decides everything, also for a rule from outside the package.

B lanes, T queries, M slots.
"""

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import ALL_RULES, tiny_transformer
from dsmr import UserError
from dsmr.attention.visibility import (
    FAR,
    RULES,
    Visibility,
    check_rule,
    earliest_position,
    find_rule,
    hidden_tokens,
    keys_per_query,
    receptive_field,
)
from dsmr.cost.operations import count_flops
from dsmr.model import Memory

SIZES = list(product([0, 4, 16, 24], [1, 3, 8], [0, 5]))  # horizon, queries, open tokens


def visibility(rule: str, horizon: int, num_queries: int, num_open: int, lengths: list[int]) -> Visibility:
    memory = Memory([horizon], num_lanes=len(lengths), num_kv_heads=1, head_width=2, segment_length=8)
    memory.clock = 40
    return Visibility(memory.ages_M(0), torch.tensor(lengths), num_open, num_queries, find_rule(rule))


def is_visible(rule: str, horizon: int, length: int, place: int, age: int) -> bool:
    """Each rule in its own words; the segment's own tokens have ages 0, -1, ..."""
    if age > length or -age > place:
        return False
    if rule == "boundary" or not horizon:
        return age <= horizon
    if rule == "sliding":
        return place + age < horizon
    return age <= 0 or age <= horizon - horizon // 4


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize(("horizon", "num_queries", "num_open"), SIZES)
def test_the_mask_is_the_rule_key_by_key(rule: str, horizon: int, num_queries: int, num_open: int) -> None:
    lengths = [0, 8, 16, 400]
    view = visibility(rule, horizon, num_queries, num_open, lengths)
    ages = [*view.ages_M.tolist(), *(-place for place in range(num_open + num_queries))]
    wanted = [
        [[is_visible(rule, horizon, length, num_open + q, age) for age in ages] for q in range(num_queries)]
        for length in lengths
    ]
    assert view.mask_B1TS[:, 0].tolist() == wanted


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("horizon", [0, 4, 16, 24])
def test_operations_count_the_visible_keys(rule: str, horizon: int) -> None:
    mask_TS = visibility(rule, horizon, 8, 0, [FAR]).mask_B1TS[0, 0]
    memory, own = mask_TS[:, :horizon].sum(dim=1), mask_TS[:, horizon:].sum(dim=1)
    assert keys_per_query(find_rule(rule), horizon, 8) == (memory.double().mean(), own.double().mean())


def test_flops_follow_the_rule() -> None:
    flops = {rule: count_flops(tiny_transformer("3x16", rule=rule), "merged").model for rule in ALL_RULES}
    pair = 4 * 16  # multiplications and additions of a score and its value, over all heads
    per_layer = 3 * pair * (8 + 1) / 2 + 2 * pair * 16
    matrices = flops["boundary"] - 3 * per_layer
    quarter = 3 * (3 * pair * (8 + 1) / 2 + 2 * pair * 12)
    assert flops["not_the_oldest_quarter"] == pytest.approx(matrices + quarter, rel=1e-12)
    assert flops["sliding"] < flops["boundary"]


@pytest.mark.parametrize("rule", ALL_RULES)
def test_hidden_tokens_are_those_that_the_mask_hides(rule: str) -> None:
    for horizon, num_queries, num_open in SIZES:
        mask_TS = visibility(rule, horizon, num_queries, num_open, [400]).mask_B1TS[0, 0, :, horizon:]
        causal = torch.ones_like(mask_TS).tril(num_open)
        assert hidden_tokens(find_rule(rule), horizon, num_open, num_queries) == tuple(
            (causal & ~mask_TS).sum(dim=1).tolist()
        )


def far_start(horizons: tuple[int, ...], segment_length: int) -> int:
    """Start of a segment with enough tokens before it."""
    return segment_length * (sum(horizons) + 1)


def back(length_B1: Tensor, position_T: Tensor, horizon: int) -> Tensor:
    """A rule whose queries see the less, the later they stand: not monotonic in the position."""
    return (horizon - 2 * position_T).clamp(min=0)


@pytest.mark.parametrize("horizons", [(16, 4, 0), (8, 8), (0, 12)])
def test_the_receptive_field_follows_the_masks_of_all_layers(horizons: tuple[int, ...]) -> None:
    for rule in (*map(find_rule, ALL_RULES), back):
        length, start = 8, 80
        for position in (start, start + 5, start + 7):
            reached = {position}
            for horizon in reversed(horizons):
                before = set()
                for one in reached:
                    first, place = one // length * length, one % length
                    far = torch.as_tensor(rule(torch.tensor([[FAR]]), torch.tensor([place]), horizon)).item()
                    oldest = min(far, horizon) if horizon else 0
                    before |= set(range(first - oldest, one + 1))
                reached = before
            assert earliest_position(position, horizons, length, rule) == min(reached)
        assert receptive_field(horizons, length, rule)[-1] == far_start(horizons, length) - earliest_position(
            far_start(horizons, length), horizons, length, rule
        )


def test_no_query_sees_another_piece_whatever_a_rule_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "everything", lambda length_B1, position_T, horizon: 10**6)
    mask = visibility("everything", 16, 8, 0, [0, 3, 100]).mask_B1TS[:, 0, :, :16]
    assert mask.sum(dim=(1, 2)).tolist() == [0, 8 * 3, 8 * 16]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda length_B1, position_T, horizon: position_T[:3], "broadcast to (B, T)"),
        (lambda length_B1, position_T, horizon: 1 / 0, "division by zero"),
        (lambda length_B1, position_T, horizon: horizon / 2, "whole numbers"),
        (lambda length_B1, position_T, horizon: -position_T - 1, "a query sees itself"),
        (lambda length_B1, position_T, horizon: -(length_B1 % 2), "the same for every length_B1"),
    ],
)
def test_a_rule_that_cannot_be_computed_is_refused_before_training(
    rule: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, "mine", rule)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="rule mine") as refused:
        tiny_transformer("1x16+2x0", rule="mine")
    assert message in str(refused.value)
    check_rule("mine", (0, 0), 8)  # layers without memory ask no rule


def test_unknown_rules_are_refused_with_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'diagonal' is not one of boundary, sliding.*mine\.my_rule"):
        tiny_transformer(rule="diagonal")
    with pytest.raises(UserError, match="No module named 'nomodule'"):
        tiny_transformer(rule="nomodule.diagonal")
    (tmp_path / "rulefile.py").write_text("diagonal = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="it is a int"):
        tiny_transformer(rule="rulefile.diagonal")


def test_attention_imports_nothing_of_the_model() -> None:
    code = "import sys, dsmr.attention; print([name for name in sys.modules if name.startswith('dsmr.model')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
