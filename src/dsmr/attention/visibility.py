"""Who sees what: the past of a layer, and which of its keys each query sees.

Shapes: B lanes, T queries, K key/value heads, D head width, M remembered slots, N open tokens (a segment that is
still open while decoding), S = M + N + T keys.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dsmr.model.horizons import Rule

Made = TypeVar("Made")


class Past(NamedTuple):
    """Keys and values of one layer from before its queries: the remembered slots, then the open tokens.

    Attributes:
        key: (B, K, M + N, D).
        value: likewise.
    """

    key: Tensor
    value: Tensor

    def split(self, num_slots: int) -> tuple["Past", "Past"]:
        """The remembered slots, and the open tokens."""
        (key, open_key), (value, open_value) = ((part[:, :, :num_slots], part[:, :, num_slots:]) for part in self)
        return Past(key, value), Past(open_key, open_value)


@dataclass(frozen=True)
class View:
    """Which keys a query sees; of what is remembered, only tokens of the lane's own piece.

    `boundary`, Transformer-XL's: its own segment up to itself, and the last `H_l` tokens before the segment.
    `sliding`: the `H_l` tokens that end with itself, wherever segments begin; its own segment up to itself in a
    layer with `H_l = 0`.

    Attributes:
        ages_M: age of every remembered slot's token; 1 is the token just before the segment.
        length_B: how many tokens of the lane's piece lie before the segment.
        num_open: N, tokens of the segment before the queries.
        num_queries: T.
        window: H_l under `sliding`, 0 under `boundary` and where the layer keeps nothing.
        made: see `make`.
    """

    ages_M: Tensor
    length_B: Tensor
    num_open: int
    num_queries: int
    window: int = 0
    made: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, ages_M: Tensor, length_B: Tensor, num_open: int, num_queries: int, rule: Rule = "boundary") -> "View":
        """The view of a layer whose horizon is the number of its slots."""
        return cls(ages_M, length_B, num_open, num_queries, len(ages_M) if rule == "sliding" else 0)

    @cached_property
    def place_T(self) -> Tensor:
        """Places of the queries in their segment."""
        return torch.arange(self.num_open, self.num_open + self.num_queries, device=self.length_B.device)

    @cached_property
    def memory_mask(self) -> Tensor | None:
        """True = visible: (B, 1, 1 or T, M), or None on the CPU if every query of every lane sees every slot.

        It has a row per query only under `sliding`.
        """
        if not self.window:
            if self.length_B.device.type == "cpu" and int(self.length_B.min()) >= len(self.ages_M):
                return None
            return (self.ages_M <= self.length_B[:, None])[:, None, None, :]
        seen_B11M = (self.ages_M <= self.length_B[:, None])[:, None, None, :]
        return seen_B11M & (self.ages_M + self.place_T[:, None] < self.window)

    @cached_property
    def blind_mask(self) -> Tensor | None:
        """True = the query sees no slot at all: (B, 1, 1 or T, 1), or None if all of them see some."""
        return None if self.memory_mask is None else ~self.memory_mask.any(dim=-1, keepdim=True)

    @cached_property
    def own_mask(self) -> Tensor | None:
        """True = visible, of the segment's N + T tokens: (T, N + T), or None if it is causal and no more."""
        own_length = self.num_open + self.num_queries
        if not self.num_open and (not self.window or self.window >= own_length):
            return None
        place = torch.arange(own_length, device=self.length_B.device)
        seen = place <= self.place_T[:, None]
        return seen & (place > self.place_T[:, None] - self.window) if self.window else seen

    @cached_property
    def mask_B1TS(self) -> Tensor:
        """True = visible: (B, 1, T, S), where S counts the slots, the open tokens, then the queries' own tokens."""
        lanes, num_queries = len(self.length_B), self.num_queries
        memory, own = self.memory_mask, self.own_mask
        if memory is None:
            memory = torch.ones(1, 1, 1, len(self.ages_M), dtype=torch.bool, device=self.length_B.device)
        if own is None:
            own = torch.ones(num_queries, num_queries, dtype=torch.bool, device=self.length_B.device).tril()
        return torch.cat([memory.expand(lanes, 1, num_queries, -1), own.expand(lanes, 1, -1, -1)], dim=-1)

    def make(self, name: str, function: Callable[["View"], Made]) -> Made:
        """What a form of attention derives from the view: made once, for all layers that share it."""
        if name not in self.made:
            self.made[name] = function(self)
        made: Made = self.made[name]
        return made
