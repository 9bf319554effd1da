"""Schedules: rules that spend a budget of memory over the depth.

A schedule assigns every layer its horizon in tokens, bottom layer first. It is configuration, never another model; a
checkpoint keeps what it expands to. A new one is a dataclass with one method:

    @dataclass(frozen=True)
    class Pyramid(Schedule):
        base: int = 4096
        def horizons(self, num_layers): return tuple(max(self.base >> layer, 128) for layer in range(num_layers))

Horizons are multiples of the network's `memory_block` (128 tokens by default). Use a schedule of your own by its class
path: `--model.horizons mine.Pyramid --model.horizons.base 8192`; scaled to a budget: `--model.horizons Fitted
--model.horizons.schedule mine.Pyramid --model.horizons.budget 12288`.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dsmr import UserError
from dsmr.model.horizons import FULL_HORIZON, format_horizons, parse_horizons

Placement = Literal["lower", "upper", "interleaved"]
Growth = Literal["linear", "geometric"]


class Schedule(ABC):
    """A rule that assigns every layer its horizon."""

    @abstractmethod
    def horizons(self, num_layers: int) -> tuple[int, ...]:
        """Horizons in tokens, bottom layer first.

        Raises:
            UserError: the rule does not fit `num_layers` layers.
        """

    def fitted(self, budget: int, block: int = 128) -> "Fitted":
        """Return the same rule, scaled so that the horizons sum to exactly `budget` tokens."""
        return Fitted(self, budget, block)

    def spend(self, budget: int, num_layers: int, block: int) -> tuple[int, ...]:
        """Return horizons of this rule's shape, multiples of `block`, that sum to `budget`.

        Each layer gets its share of the blocks, rounded down; the blocks that are left go to the layers that lost
        most. A rule whose shape this would break overrides it.

        Raises:
            UserError: no horizons of this shape have that sum.
        """
        shape = self.horizons(num_layers)
        if budget % block or budget < 0 or not sum(shape):
            raise _unspent(self, budget, num_layers, block, legal=_around(budget, block) if sum(shape) else [0])
        shares = [divmod(tokens * budget, block * sum(shape)) for tokens in shape]
        left = budget // block - sum(blocks for blocks, _ in shares)
        losers = sorted(range(num_layers), key=lambda layer: (shares[layer][1], shape[layer]))[num_layers - left :]
        return tuple(block * (blocks + (layer in losers)) for layer, (blocks, _) in enumerate(shares))


@dataclass(frozen=True)
class Full(Schedule):
    """Every layer at the full horizon: the Transformer-XL reference (arXiv 1901.02860, section 3.2)."""

    horizon: int = FULL_HORIZON

    def horizons(self, num_layers: int) -> tuple[int, ...]:
        """`(horizon,) * num_layers`."""
        return (self.horizon,) * num_layers

    def spend(self, budget: int, num_layers: int, block: int) -> tuple[int, ...]:
        """The same horizon everywhere, `budget / num_layers`."""
        return (_part(self, budget, num_layers, num_layers, block),) * num_layers


@dataclass(frozen=True)
class Uniform(Full):
    """Every layer at the same horizon, shorter than the reference's: equal shares of the budget."""

    horizon: int = 1024


@dataclass(frozen=True)
class TwoScale(Schedule):
    """A few layers with a long horizon, all others with a short one.

    Our `placement="lower"` is the paper's two-scale schedule: "long history windows to lower layers and a
    uniform short window to the remaining layers". `interleaved` spreads the long layers evenly, starting at the
    bottom. To spend a budget, only the long horizon is scaled.
    """

    long: int = 3584
    short: int = 512
    num_long: int = 2
    placement: Placement = "lower"

    def horizons(self, num_layers: int) -> tuple[int, ...]:
        """`num_long` layers of `long` tokens, the rest of `short` tokens.

        Raises:
            UserError: more long layers than layers, or a long horizon below the short one.
        """
        if self.long < self.short:
            raise UserError(f"two-scale: long ({self.long}) is below short ({self.short}); swap them")
        selected = placed_layers(self.num_long, num_layers, self.placement, key="num_long")
        return tuple(self.long if layer in selected else self.short for layer in range(num_layers))

    def spend(self, budget: int, num_layers: int, block: int) -> tuple[int, ...]:
        """Scale the long horizon; the short one stays."""
        long = _part(self, budget, self.num_long, num_layers, block, short=self.short)
        return replace(self, long=long).horizons(num_layers)


@dataclass(frozen=True)
class Binary(Schedule):
    """Selective retention: some layers keep a horizon, the others keep nothing.

    The paper's binary-horizon schedules. Its claim that "performance depends primarily on total allocated memory
    rather than which layers carry it" can be tested with `placement`, or with a list of layers.

    Attributes:
        long: tokens that a selected layer keeps.
        layers: how many layers are selected, or a list of their numbers, 0 being the bottom layer.
        placement: where they are, if `layers` is a number.
    """

    long: int = 4096
    layers: int | tuple[int, ...] = 3
    placement: Placement = "lower"

    def horizons(self, num_layers: int) -> tuple[int, ...]:
        """`long` tokens in the selected layers, 0 in the others.

        Raises:
            UserError: the network has no such layers, or a list comes with a placement.
        """
        selected = self._selected(num_layers)
        return tuple(self.long if layer in selected else 0 for layer in range(num_layers))

    def spend(self, budget: int, num_layers: int, block: int) -> tuple[int, ...]:
        """Divide the budget among the selected layers."""
        long = _part(self, budget, len(self._selected(num_layers)), num_layers, block)
        return replace(self, long=long).horizons(num_layers)

    def _selected(self, num_layers: int) -> frozenset[int]:
        if isinstance(self.layers, int):
            return placed_layers(self.layers, num_layers, self.placement, key="layers")
        selected = frozenset(self.layers)
        if len(selected) != len(self.layers) or not selected <= set(range(num_layers)):
            raise UserError(
                f"binary: layers {list(self.layers)} must be different numbers from 0 (bottom layer) to "
                f"{num_layers - 1} (top layer)"
            )
        if self.placement != "lower":
            raise UserError(f"binary: a list of layers takes no placement; leave out placement {self.placement}")
        return selected


@dataclass(frozen=True)
class Ascending(Schedule):
    """Progressive caps: horizons grow from the bottom layer to the top. The paper's progressive ascending schedule.

    Attributes:
        shortest: tokens that the bottom layer keeps.
        longest: tokens that the top layer keeps.
        growth: by the same number of tokens from layer to layer, or by the same factor.
        block: round each horizon to a multiple of `block` tokens.
    """

    shortest: int = 128
    longest: int = 1920
    growth: Growth = "linear"
    block: int = 128

    def horizons(self, num_layers: int) -> tuple[int, ...]:
        """Return horizons from `shortest` to `longest`.

        Raises:
            UserError: the longest horizon is below the shortest, or geometric growth starts at 0.
        """
        name = type(self).__name__.lower()
        if self.longest < self.shortest or self.block < 1:
            raise UserError(
                f"{name}: longest ({self.longest}) must be at least shortest ({self.shortest}), block ({self.block}) "
                "at least 1"
            )
        if self.growth == "linear":
            step = (self.longest - self.shortest) / max(1, num_layers - 1)
            exact = [self.shortest + step * layer for layer in range(num_layers)]
        elif self.growth != "geometric":
            raise UserError(f"{name}: growth {self.growth!r} is not one of linear, geometric")
        elif self.shortest < 1:
            raise UserError(f"{name}: geometric growth cannot start from {self.shortest}; give shortest at least 1")
        else:
            factor = (self.longest / self.shortest) ** (1 / max(1, num_layers - 1))
            exact = [self.shortest * factor**layer for layer in range(num_layers)]
        return tuple(self.block * round(tokens / self.block) for tokens in exact)


@dataclass(frozen=True)
class Descending(Ascending):
    """Progressive caps that shrink from the bottom layer to the top: `Ascending` upside down."""

    def horizons(self, num_layers: int) -> tuple[int, ...]:
        """Return horizons from `longest` to `shortest`."""
        return super().horizons(num_layers)[::-1]


@dataclass(frozen=True)
class Fitted(Schedule):
    """Another schedule, scaled to spend a budget to the token.

    Attributes:
        schedule: the shape.
        budget: sum of all horizons in tokens.
        block: each horizon is a multiple of `block` tokens, itself a multiple of the network's `memory_block`.
    """

    schedule: Schedule
    budget: int = 12_288
    block: int = 128

    def horizons(self, num_layers: int) -> tuple[int, ...]:
        """Return the schedule's horizons, scaled.

        Raises:
            UserError: the shape cannot have this sum; the message lists the nearest sums that it can have.
        """
        if self.block < 1:
            raise UserError(f"fitted: block is {self.block}; it must be at least 1")
        return self.schedule.spend(self.budget, num_layers, self.block)


def placed_layers(num_selected: int, num_layers: int, placement: Placement, *, key: str) -> frozenset[int]:
    """Return the numbers of `num_selected` layers (0 = bottom); `key` names the setting in an error.

    Raises:
        UserError: `num_selected` is not within 0..num_layers, or the placement is unknown.
    """
    if not 0 <= num_selected <= num_layers:
        raise UserError(f"{key} is {num_selected}, but the network has {num_layers} layers; give 0 to {num_layers}")
    if placement == "lower":
        return frozenset(range(num_selected))
    if placement == "upper":
        return frozenset(range(num_layers - num_selected, num_layers))
    if placement == "interleaved":
        return frozenset(k * num_layers // num_selected for k in range(num_selected))
    raise UserError(f"placement {placement!r} is not one of lower, upper, interleaved")


def expand_horizons(horizons: "Schedule | str | Sequence[int]", num_layers: int) -> tuple[int, ...]:
    """Return the horizons of a schedule, a string or a list for `num_layers` layers, bottom to top.

    Raises:
        UserError: a string or list has another number of layers, or a schedule does not fit.
    """
    if isinstance(horizons, Schedule):
        return _checked(horizons, num_layers)
    expanded = parse_horizons(horizons) if isinstance(horizons, str) else tuple(horizons)
    if len(expanded) != num_layers:
        raise UserError(
            f"horizons {format_horizons(expanded)} have {len(expanded)} layers, but num_layers is {num_layers}; "
            f"for {num_layers} layers write, for example, {_example(expanded, num_layers)}"
        )
    return expanded


def _checked(schedule: Schedule, num_layers: int) -> tuple[int, ...]:
    """Return the horizons of a schedule, checked, since it may be a user's own."""
    name = type(schedule).__name__
    try:
        given = schedule.horizons(num_layers)
    except ValueError as error:  # of a user's own schedule
        raise UserError(str(error)) from error
    try:
        expanded = tuple(operator.index(tokens) for tokens in given)
    except TypeError as error:
        raise UserError(f"{name}.horizons({num_layers}) returned {given!r}; it must return whole numbers") from error
    if len(expanded) != num_layers or min(expanded, default=0) < 0:
        raise UserError(
            f"{name}.horizons({num_layers}) returned {expanded}; it must return {num_layers} numbers of tokens, none "
            "negative"
        )
    return expanded


def _part(schedule: Schedule, budget: int, count: int, num_layers: int, block: int, *, short: int = 0) -> int:
    """Return the horizon of `count` equal layers that spends the budget, the others having `short` tokens each."""
    fixed, unit = short * (num_layers - count), max(count, 1) * block
    long, rest = divmod(budget - fixed, unit)
    if count and not rest and block * long >= short:
        return block * long
    least = count * block * -(-short // block)
    legal = [fixed + max(least, tokens) for tokens in _around(budget - fixed, unit)] if count else [fixed]
    raise _unspent(schedule, budget, num_layers, block, legal)


def _around(tokens: int, unit: int) -> list[int]:
    """Return the multiples of a unit below and above, none negative."""
    below = max(0, tokens // unit)
    return [below * unit, (below + 1) * unit]


def _unspent(schedule: Schedule, budget: int, num_layers: int, block: int, legal: list[int]) -> UserError:
    """Return the error for a budget that cannot be spent, with the nearest ones that can."""
    name = type(schedule).__name__
    can = " or ".join(str(tokens) for tokens in sorted(set(legal)))
    return UserError(
        f"{name} over {num_layers} layers in blocks of {block} tokens cannot spend a budget of {budget}; "
        f"it can spend {can}"
    )


def _example(expanded: tuple[int, ...], num_layers: int) -> str:
    if num_layers < len(expanded):
        return format_horizons(expanded[:num_layers])
    return format_horizons(expanded + expanded[-1:] * (num_layers - len(expanded)))
