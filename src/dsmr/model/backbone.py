"""The interface between a recurrent network and everything that streams pieces through it.

State is passed in and returned, never hidden in the network: training, validation and generation each hold a
memory of their own. B lanes, T segment, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from dsmr.model.horizons import MAESTRO_RATE, Rule, TokenRate
from dsmr.model.memory import Memory, Update


class Backbone(nn.Module, ABC):
    """A language model that reads pieces segment by segment.

    Attributes:
        vocab_size: V.
        segment_length: T, tokens per lane and full pass; the function that the network computes depends on it.
        horizons: tokens that each layer keeps, bottom to top; empty where the state is of another kind.
        rule: what a query sees of them, see `dsmr.model.attention`.
    """

    vocab_size: int
    segment_length: int
    horizons: tuple[int, ...]
    rule: Rule = "boundary"

    @abstractmethod
    def init_memory(self, num_lanes: int, *, decoding: bool = False) -> Memory:
        """Make an empty memory on the network's device; `decoding` keeps room for the open segment."""

    @abstractmethod
    def forward(self, tokens_BT: Tensor, memory: Memory, is_start_B: Tensor | None = None) -> tuple[Tensor, Update]:
        """Read a segment, or part of one while decoding; nothing that was given is changed.

        Args:
            tokens_BT: token ids, int64; T at most `segment_length`, less what the open segment holds.
            memory: what the lanes remember.
            is_start_B: bool, lanes that begin a new piece with this segment and must not see their memory.

        Returns:
            logits (B, T, V) and the update that `memory.commit` takes.
        """

    def remembering(self, horizons: Sequence[int]) -> AbstractContextManager[None]:
        """Other horizons, for the memories that are made and used inside; the weights are the same.

        Raises:
            ValueError: the network has none, or they do not fit it.
        """
        raise ValueError(f"{type(self).__name__} has no horizons: what it remembers cannot be changed by layer")

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this network: plain numbers, texts and lists, horizons expanded."""

    @abstractmethod
    def state_bytes(self, num_lanes: int, itemsize: int, *, decoding: bool = False) -> int:
        """Bytes that `init_memory` allocates for B lanes at `itemsize` bytes a number, as a formula."""

    @abstractmethod
    def summary(self, rate: TokenRate | None = MAESTRO_RATE) -> str:
        """What the network remembers, in a few lines to read; with seconds of music, unless `rate` is None."""
