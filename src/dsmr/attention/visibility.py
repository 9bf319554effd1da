"""Attention visibility: which cached keys each query may attend to, as one number per query.

Every key has an *age*, counted backwards from the start of the present segment:

            memory, M slots                     segment, T tokens
    age     M  ...  4   3   2   1         |     0  -1  -2  ...  1-T
    position                              |     0   1   2  ...  T-1

    boundary   |<--------- horizon ------>|  q            every query of the segment reaches equally far back
    sliding            |<---------------- horizon ->q     a query reaches back from its own position

A query may attend to a key iff the key is not in its future and `age <= oldest_seen[b, q]`. A *rule* computes
`oldest_seen`; everything else derives from that number: the masks of every implementation in this package, the blocks
of FlexAttention, decoding, operations per token, and the receptive field.

To forbid something, write one function, and pass it by its import path or add it to `RULES`. This one hides the oldest
quarter of the slots, which are still stored:

    def not_the_oldest_quarter(length_B1, position_T, horizon):     # --model.backbone.rule
        return horizon - horizon // 4                               #     mine.not_the_oldest_quarter

Shapes: B lanes, T queries, K key/value heads, D head width, M memory slots, N open tokens (the part of a segment that
decoding has read so far), S = M + N + T keys.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dsmr import UserError

Derived = TypeVar("Derived")
Rule = Callable[[Tensor, Tensor, int], Tensor | int]
"""`rule(length_B1, position_T, horizon)` returns `oldest_seen`, broadcastable to (B, T).

`length_B1` is the number of tokens of the lane's piece before the segment, `position_T` the queries' positions in the
segment, `horizon` the number of slots, at least 1; tensors that a rule creates belong on `position_T.device`. The
result is capped at `length_B1`, so that no query ever sees
another piece, and at the slots that exist. A negative result also hides the oldest tokens of the segment itself; that
part must not depend on `length_B1`. Layers without memory see their own segment and ask no rule.
"""


def boundary(length_B1: Tensor, position_T: Tensor, horizon: int) -> Tensor:
    """Transformer-XL's rule (arXiv 1901.02860): the own segment, and the whole memory before it."""
    return length_B1


def sliding(length_B1: Tensor, position_T: Tensor, horizon: int) -> Tensor:
    """Exactly `horizon` keys, the query's own included, wherever segments begin."""
    return horizon - 1 - position_T


RULES: dict[str, Rule] = {"boundary": boundary, "sliding": sliding}
FAR = 2**40  # more tokens than any piece has
STRETCH = 512  # positions whose hidden tokens are computed at once, and cached for decoding


class Past(NamedTuple):
    """Keys and values of one layer that were computed before its queries: the memory's slots, then the open tokens.

    Attributes:
        key: (B, K, M + N, D).
        value: (B, K, M + N, D).
    """

    key: Tensor
    value: Tensor

    def split(self, num_slots: int) -> tuple["Past", "Past"]:
        """Return the memory and the open tokens."""
        (key, open_key), (value, open_value) = ((part[:, :, :num_slots], part[:, :, num_slots:]) for part in self)
        return Past(key, value), Past(open_key, open_value)


@dataclass(frozen=True)
class Visibility:
    """Keys that the queries of one pass may attend to, in a layer with M slots. Layers of the same horizon share it.

    Attributes:
        ages_M: age of every slot's token, 1 being the token just before the segment.
        length_B: tokens of the lane's piece before the segment.
        num_open: N, tokens of the segment before the queries.
        num_queries: T.
        rule: computes `oldest_seen`.
        derived: see `derive`.
    """

    ages_M: Tensor
    length_B: Tensor
    num_open: int
    num_queries: int
    rule: Rule = boundary
    derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def oldest_seen(self) -> Tensor:
        """Greatest visible age, (B, 1) if it is the same for all queries of a lane, else (B, T)."""
        length_B1, horizon = self.length_B[:, None], len(self.ages_M)
        if not horizon or self.rule is boundary:  # stays (B, 1): the memory's mask then has one row per lane
            return length_B1
        oldest = self.rule(length_B1, self.position_T, horizon)
        return torch.minimum(length_B1, oldest) if isinstance(oldest, Tensor) else length_B1.clamp(max=oldest)

    @cached_property
    def position_T(self) -> Tensor:
        """Positions of the queries in their segment."""
        return torch.arange(self.num_open, self.num_open + self.num_queries, device=self.length_B.device)

    @property
    def num_hidden(self) -> tuple[int, ...]:
        """For each query, how many tokens at the segment's start it may not attend to."""
        return hidden_tokens(self.rule, len(self.ages_M), self.num_open, self.num_queries)

    @cached_property
    def memory_mask(self) -> Tensor | None:
        """True = visible: (B, 1, 1 or T, M). On the CPU, None if every query of every lane sees every slot."""
        # only on the CPU: reading a number of a GPU would wait for it
        if self.length_B.device.type == "cpu" and int(self.oldest_seen.min()) >= len(self.ages_M):
            return None
        return (self.ages_M <= self.oldest_seen[..., None])[:, None]

    @cached_property
    def blind_mask(self) -> Tensor | None:
        """True = the query sees no slot: (B, 1, 1 or T, 1), or None if every query sees every slot."""
        return None if self.memory_mask is None else ~self.memory_mask.any(dim=-1, keepdim=True)

    @cached_property
    def own_mask(self) -> Tensor | None:
        """True = visible, of the segment's N + T tokens: (T, N + T), or None if plainly causal."""
        if not self.num_open and not any(self.num_hidden):
            return None
        position = torch.arange(self.num_open + self.num_queries, device=self.length_B.device)
        hidden_T = on_device(self.num_hidden, position.device)
        return (position <= self.position_T[:, None]) & (position >= hidden_T[:, None])

    @cached_property
    def mask_B1TS(self) -> Tensor:
        """True = visible, over all keys: the slots, the open tokens, then the queries' own tokens."""
        lanes, num_queries = len(self.length_B), self.num_queries
        memory, own = self.memory_mask, self.own_mask
        if memory is None:
            memory = torch.ones(1, 1, 1, len(self.ages_M), dtype=torch.bool, device=self.length_B.device)
        if own is None:
            own = torch.ones(num_queries, num_queries, dtype=torch.bool, device=self.length_B.device).tril()
        return torch.cat([memory.expand(lanes, 1, num_queries, -1), own.expand(lanes, 1, -1, -1)], dim=-1)

    def derive(self, name: str, function: Callable[["Visibility"], Derived]) -> Derived:
        """Cache an implementation's own mask under `name`; layers with the same horizon share it."""
        if name not in self.derived:
            self.derived[name] = function(self)
        derived: Derived = self.derived[name]
        return derived


def find_rule(name: str | Rule) -> Rule:
    """Return the rule of an entry of `RULES`, or the function at an import path; a function is returned as it is.

    Raises:
        UserError: there is no such rule, or its module cannot be imported.
    """
    if not isinstance(name, str):
        return name
    if name in RULES:
        return RULES[name]
    module, _, function = name.rpartition(".")
    expected = f"rule {name!r} is not one of {', '.join(RULES)}, nor the import path of a function"
    if not module:
        raise UserError(f"{expected}, such as mine.my_rule")
    try:
        rule = getattr(importlib.import_module(module), function)
    except Exception as error:  # a user's module may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            reason += f"; run this in the folder that has {module.partition('.')[0]}, or put that folder on PYTHONPATH"
        raise UserError(f"{expected} that can be imported: {reason}") from error
    if not callable(rule):
        raise UserError(f"{expected}: it is a {type(rule).__name__}")
    found: Rule = rule
    return found


def check_rule(name: str, horizons: Sequence[int], segment_length: int) -> None:
    """Try a rule on every horizon of a network, so that a mistake shows before training.

    Raises:
        UserError: the rule fails, returns another shape than (B, T), or hides a part of the segment that depends on
            the length of the piece.
    """
    rule = find_rule(name)
    with torch.device("cpu"):  # a network may be built on torch's meta device, which has no values
        position_T, lengths_B1 = torch.arange(segment_length), torch.tensor([[0], [1], [segment_length], [FAR]])
    for horizon in sorted({horizon for horizon in horizons if horizon}):
        try:
            with torch.device("cpu"):
                oldest = torch.as_tensor(rule(lengths_B1, position_T, horizon)).expand(len(lengths_B1), segment_length)
        except Exception as error:  # a user's rule may raise anything
            raise UserError(
                f"rule {name} fails for horizon {horizon} ({' '.join(str(error).split())}); it must return whole "
                "numbers that broadcast to (B, T)"
            ) from error
        own = oldest.clamp(max=0)
        if oldest.is_floating_point() or not (own == own[0]).all() or (-own[0] > position_T).any():
            raise UserError(
                f"rule {name}: for horizon {horizon} it must return whole numbers, at least -position_T (a query sees "
                "itself), and where they are negative, the same for every length_B1"
            )


def hidden_tokens(rule: Rule, horizon: int, num_open: int, num_queries: int) -> tuple[int, ...]:
    """For each query, how many tokens at the segment's start a rule hides: `max(0, -oldest_seen)`.

    Computed on the host from sizes alone, so that a GPU is never waited for.
    """
    if not horizon or rule is boundary:
        return (0,) * num_queries
    end = num_open + num_queries
    return _hidden_by_position(rule, horizon, -(-end // STRETCH) * STRETCH)[num_open:end]


@lru_cache(maxsize=64)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers as a tensor that is copied to a device once: a copy in every step would wait for the GPU."""
    with torch.inference_mode(False):  # training reads the cached tensor too
        return torch.tensor(numbers, device=device)


@lru_cache(maxsize=256)
def _hidden_by_position(rule: Rule, horizon: int, num_positions: int) -> tuple[int, ...]:
    return tuple((-_oldest_by_position(rule, horizon, num_positions)).clamp(min=0).tolist())


def keys_per_query(rule: Rule, horizon: int, segment_length: int) -> tuple[float, float]:
    """Return how many slots, and how many tokens of its own segment, a query sees on average; all slots filled."""
    own = (segment_length + 1) / 2 - sum(hidden_tokens(rule, horizon, 0, segment_length)) / segment_length
    if not horizon:
        return 0.0, own
    return float(_oldest_by_position(rule, horizon, segment_length).clamp(0, horizon).double().mean()), own


def earliest_position(position: int, horizons: Sequence[int], segment_length: int, rule: Rule | str = boundary) -> int:
    """Return the earliest position that the prediction at `position` can depend on, through all layers.

    Layer by layer from the top: what is visible to any position reached so far. Under `boundary` each layer leads
    from a token to its segment's start and `H_l` tokens further back; under `sliding` to the `H_l - 1` tokens before
    it, or to its segment's start where `H_l = 0`. Negative: before the piece's beginning.
    """
    first = position  # everything from here to `position` is reached
    for horizon in reversed(horizons):
        reached = range(first, min(position, first + segment_length - 1) + 1)  # later segments repeat these positions
        reach = _reach(find_rule(rule), horizon, segment_length)
        first = min(one - reach[one % segment_length] for one in reached)
    return first


def receptive_field(horizons: Sequence[int], segment_length: int, rule: Rule | str = boundary) -> tuple[int, ...]:
    """Return how far before a segment's start its first position can depend on tokens, after 1, 2, ... L layers."""
    start = segment_length * (sum(horizons) + 1)  # of a segment with enough before it
    depths = range(1, len(horizons) + 1)
    return tuple(start - earliest_position(start, horizons[:depth], segment_length, rule) for depth in depths)


@lru_cache(maxsize=256)
def _reach(rule: Rule, horizon: int, segment_length: int) -> tuple[int, ...]:
    """Distance of the oldest visible key from each position of a segment, in a long piece."""
    positions = range(segment_length)
    if not horizon:
        return tuple(positions)
    oldest_T = _oldest_by_position(rule, horizon, segment_length).clamp(max=horizon)
    return tuple(position + oldest for position, oldest in zip(positions, oldest_T.tolist(), strict=True))


def _oldest_by_position(rule: Rule, horizon: int, num_positions: int) -> Tensor:
    """Greatest visible age for a query at each position, in a piece of any length, (T,), on the CPU."""
    with torch.inference_mode(False), torch.device("cpu"):
        length_B1, position_T = torch.tensor([[FAR]]), torch.arange(num_positions)
        oldest = torch.as_tensor(rule(length_B1, position_T, horizon))
        return torch.minimum(length_B1, oldest).expand(1, num_positions)[0]
