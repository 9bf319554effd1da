"""The interface between a recurrent network and everything that streams pieces through it.

State is passed in and returned, never hidden in the network: training, validation and generation each hold a
memory of their own. B lanes, T segment, V vocabulary.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from dsmr import UserError
from dsmr.model.horizons import MAESTRO_RATE, Rule, TokenRate
from dsmr.model.memory import Memory, Update

Made = TypeVar("Made")


class Backbone(nn.Module, ABC):
    """A language model that reads pieces segment by segment.

    A network of your own derives from this class or from `RecurrentTransformer`, in a module that Python finds (one in
    the current folder, for example), and is given by its class path: `--model.backbone mynet.Mine`. The first three
    parameters of its constructor are `vocab_size, horizons, segment_length`; the others are options on the command
    line. A checkpoint keeps the class path and `config()`, so `config()` must give every argument:

        class Mine(RecurrentTransformer):
            def __init__(self, vocab_size, horizons, segment_length, *, scale: float = 1.0, **sizes) -> None:
                super().__init__(vocab_size, horizons, segment_length, **sizes)
                self.scale = scale

            def config(self): return super().config() | {"scale": self.scale}

    Attributes:
        OPTIONS: names of constructor arguments that change how the network is computed, not what; not in `config`.
        vocab_size: V.
        segment_length: T, tokens per lane and full pass; the function that the network computes depends on it.
        horizons: tokens that each layer keeps, bottom to top; empty where the state is of another kind.
        rule: what a query sees of them, see `dsmr.attention.attend`.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ()
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
            UserError: the network has none, or they do not fit it.
        """
        raise UserError(f"{type(self).__name__} has no horizons: what it remembers cannot be changed by layer")

    def stacked_rows(self) -> dict[Tensor, tuple[int, ...]]:
        """Return the row counts of the projections in each parameter that stacks several; Muon treats them apart."""
        return {}

    @property
    def compiles_each_length(self) -> bool:
        """True if a pass of a length not seen before is compiled first; prompts are then read in one length only."""
        return False

    @classmethod
    def rebuild(cls, config: dict[str, Any], **options: Any) -> Self:
        """Build the network that `config()` describes, with those of the options that the constructor takes."""
        parameters = inspect.signature(cls).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        taken = {k: v for k, v in options.items() if k in cls.OPTIONS and (takes_any or k in parameters)}
        return cls(**config | taken)

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this network: plain numbers, texts and lists, horizons expanded."""

    @abstractmethod
    def state_bytes(self, num_lanes: int, itemsize: int, *, decoding: bool = False) -> int:
        """Bytes that `init_memory` allocates for B lanes at `itemsize` bytes a number, as a formula."""

    @abstractmethod
    def summary(self, rate: TokenRate | None = MAESTRO_RATE) -> str:
        """What the network remembers, in a few lines to read; with seconds of music, unless `rate` is None."""


def summary_of(backbone: Backbone, rate: TokenRate | None) -> str:
    """Return the summary of a network; one of a user's own need not take `rate`."""
    return backbone.summary(rate) if inspect.signature(backbone.summary).parameters else backbone.summary()


def name_of(network: type[Backbone]) -> str:
    """Name of a network in checkpoints and messages: the class of one of ours, the class path of a user's own."""
    is_own = not network.__module__.startswith("dsmr.model.")
    return f"{network.__module__}.{network.__qualname__}" if is_own else network.__name__


def is_ours(name: str) -> bool:
    """Whether a name, as of `name_of`, is that of a network in `dsmr.model`."""
    return "." not in name


def without_weights(make: Callable[[], Made]) -> Made:
    """Build something on torch's meta device, for its sizes alone; on the CPU if its constructor reads its tensors."""
    try:
        with torch.device("meta"):
            return make()
    except (NotImplementedError, RuntimeError):  # torch's errors for a value that a meta tensor does not have
        return make()


def twin(backbone: Backbone) -> Backbone:
    """Copy a network for evaluation: the same parameters, not copied, in layers that are not compiled."""
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    for module in backbone.modules():  # a user's network may keep activations, which cannot be copied
        kept = (value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf)
        shared |= {id(value): value.detach() for value in kept}
    return copy.deepcopy(backbone, shared).eval()  # a copied module is not compiled
