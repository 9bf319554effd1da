"""Horizons: how many past tokens each layer keeps, and the schedules that spend a budget over the depth.

A horizon `H_l` is the number of tokens of which layer l keeps the keys and values; `horizons` lists them from
the bottom layer to the top, the budget is their sum. Their one spelling, `2x3584+10x512`, reads bottom to top:
two layers of 3,584 tokens, then ten of 512. The idea of a depth-structured budget is that of Depth-Structured
Music Recurrence (arXiv 2602.19816); its window lengths are not public, so the numbers here are ours.

No torch in this file: a schedule is arithmetic.

A new schedule is a dataclass with one method:

    @dataclass(frozen=True)
    class Pyramid(Schedule):
        base: int
        def horizons(self, num_layers): return tuple(self.base >> layer for layer in range(num_layers))
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

TOKENS_PER_SECOND = 39.8
"""Tokens of the `performance` encoding in one second of music: the mean over the whole of MAESTRO v3.0.0."""

Placement = Literal["lower", "upper", "interleaved"]


class Schedule(ABC):
    """A rule that gives every layer its horizon."""

    @abstractmethod
    def horizons(self, num_layers: int) -> tuple[int, ...]:
        """Horizons in tokens, bottom layer first.

        Raises:
            ValueError: the rule cannot be laid over `num_layers` layers.
        """


@dataclass(frozen=True)
class Full(Schedule):
    """Every layer at the full horizon: the Transformer-XL reference (arXiv 1901.02860, section 3.2)."""

    horizon: int = 4096

    def horizons(self, num_layers: int) -> tuple[int, ...]:
        """`(horizon,) * num_layers`."""
        return (self.horizon,) * num_layers


@dataclass(frozen=True)
class Uniform(Schedule):
    """Every layer at the same horizon, shorter than the reference's: an equal share of the budget."""

    horizon: int = 1024

    def horizons(self, num_layers: int) -> tuple[int, ...]:
        """`(horizon,) * num_layers`."""
        return (self.horizon,) * num_layers


@dataclass(frozen=True)
class TwoScale(Schedule):
    """A few layers with a long horizon, all others with a short one.

    Our `placement="lower"` is the paper's two-scale schedule: "long history windows to lower layers and a
    uniform short window to the remaining layers". `interleaved` spreads the long layers evenly, the first of
    them at the bottom.
    """

    long: int = 3584
    short: int = 512
    num_long: int = 2
    placement: Placement = "lower"

    def horizons(self, num_layers: int) -> tuple[int, ...]:
        """`num_long` layers of `long` tokens, the rest of `short` tokens.

        Raises:
            ValueError: more long layers than layers, or a long horizon below the short one.
        """
        if self.long < self.short:
            raise ValueError(f"two-scale: long ({self.long}) is below short ({self.short}); swap them")
        chosen = placed(self.num_long, num_layers, self.placement)
        return tuple(self.long if layer in chosen else self.short for layer in range(num_layers))


def placed(num_chosen: int, num_layers: int, placement: Placement) -> frozenset[int]:
    """Layer numbers (0 = bottom) of `num_chosen` layers out of `num_layers`.

    Raises:
        ValueError: `num_chosen` is not within 0..num_layers, or the placement has no such name.
    """
    if not 0 <= num_chosen <= num_layers:
        raise ValueError(f"{num_chosen} layers cannot be chosen out of {num_layers}; give 0 to {num_layers}")
    if placement == "lower":
        return frozenset(range(num_chosen))
    if placement == "upper":
        return frozenset(range(num_layers - num_chosen, num_layers))
    if placement == "interleaved":
        return frozenset(k * num_layers // num_chosen for k in range(num_chosen))
    raise ValueError(f"placement {placement!r} is not one of lower, upper, interleaved")


def parse_horizons(text: str) -> tuple[int, ...]:
    """Read horizons in their one spelling: `2x3584+10x512` is (3584, 3584, 512, ... 512), bottom to top.

    Raises:
        ValueError: the text is not terms `COUNTxTOKENS` joined by `+`.
    """
    horizons: list[int] = []
    for term in text.replace(" ", "").split("+"):
        match = re.fullmatch(r"(?:(\d+)x)?(\d+)", term)
        if match is None or match[1] == "0":
            raise ValueError(
                f"horizons {text!r}: {term!r} is not LAYERSxTOKENS; write them bottom to top as in 2x3584+10x512"
            )
        horizons += [int(match[2])] * int(match[1] or 1)
    return tuple(horizons)


def format_horizons(horizons: Sequence[int]) -> str:
    """The one spelling of horizons; the inverse of `parse_horizons`."""
    return "+".join(f"{len(list(run))}x{tokens}" for tokens, run in groupby(horizons))


def expand(horizons: "Schedule | str | Sequence[int]", num_layers: int) -> tuple[int, ...]:
    """Horizons of a schedule, a text or a list for a model of `num_layers` layers, bottom to top.

    Raises:
        ValueError: a text or list names another number of layers, or a schedule does not fit.
    """
    if isinstance(horizons, Schedule):
        return horizons.horizons(num_layers)
    expanded = parse_horizons(horizons) if isinstance(horizons, str) else tuple(horizons)
    if len(expanded) != num_layers:
        raise ValueError(
            f"horizons {format_horizons(expanded)} name {len(expanded)} layers, but num_layers is {num_layers}; "
            f"for {num_layers} layers write, for example, {_example(expanded, num_layers)}"
        )
    return expanded


def check_horizons(horizons: Sequence[int], segment_length: int, memory_block: int) -> None:
    """Refuse horizons that the memory's ring cannot hold.

    Raises:
        ValueError: `memory_block` does not divide `segment_length` and every horizon (all in tokens).
    """
    if memory_block < 1 or segment_length < 1:
        raise ValueError(f"memory_block ({memory_block}) and segment_length ({segment_length}) must be >= 1")
    if segment_length % memory_block:
        raise ValueError(
            f"segment_length {segment_length} is not a multiple of memory_block {memory_block}; "
            f"{_nearest(segment_length, memory_block)} would be"
        )
    for horizon in horizons:
        if horizon % memory_block:
            raise ValueError(
                f"horizon {horizon} in {format_horizons(horizons)} is not a multiple of memory_block "
                f"{memory_block}; {_nearest(horizon, memory_block)} would be"
            )


def describe(horizons: Sequence[int]) -> str:
    """One line: the spelling, its budget in tokens, and the longest horizon in seconds of music."""
    seconds = max(horizons) / TOKENS_PER_SECOND
    return f"{format_horizons(horizons)} (budget {sum(horizons):,} tokens, longest {seconds:.0f} s of music)"


def _nearest(tokens: int, block: int) -> str:
    below = tokens // block * block
    return f"{below} or {below + block}" if below else str(block)


def _example(expanded: tuple[int, ...], num_layers: int) -> str:
    if num_layers < len(expanded):
        return format_horizons(expanded[:num_layers])
    return format_horizons(expanded + expanded[-1:] * (num_layers - len(expanded)))
