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
from dsmr.model.horizons import MAESTRO_RATE, TokenRate
from dsmr.model.memory import Memory, Update

Built = TypeVar("Built")


class Backbone(nn.Module, ABC):
    """A language model that reads pieces segment by segment.

    A network of your own derives from this class or from `RecurrentTransformer`, in a module that Python finds (one in
    the current folder, for example), and is used by its class path: `--model.backbone mynet.Mine`. Its constructor
    takes `vocab_size`, `segment_length`, and `horizons` if it has any; all other parameters become options on the
    command line. A checkpoint keeps the class path and `config()`, so `config()` must return every argument:

        class Mine(RecurrentTransformer):
            def __init__(self, vocab_size, horizons, segment_length, *, scale: float = 1.0, **settings) -> None:
                super().__init__(vocab_size, horizons, segment_length, **settings)
                self.scale = scale

            def config(self): return super().config() | {"scale": self.scale}

    Attributes:
        OPTIONS: names of constructor arguments that change how the network is computed, not what; not in `config`.
        vocab_size: V.
        segment_length: T, tokens per lane and full pass; the function that the network computes depends on it.
        horizons: tokens that each layer keeps, bottom to top; empty if the state is of another kind.
        rule: which keys a query may attend to, see `dsmr.attention.visibility`.
        memory_block: tokens; divides every horizon.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ()
    vocab_size: int
    segment_length: int
    horizons: tuple[int, ...] = ()
    rule: str = "boundary"
    memory_block: int = 1

    @abstractmethod
    def init_memory(self, num_lanes: int, *, decoding: bool = False) -> Memory:
        """Make an empty memory on the network's device; `decoding` adds room for the open segment."""

    @abstractmethod
    def forward(self, tokens_BT: Tensor, memory: Memory, is_start_B: Tensor | None = None) -> tuple[Tensor, Update]:
        """Read a segment, or part of one while decoding; no argument is changed.

        Args:
            tokens_BT: token ids, int64; at most `segment_length`, less the tokens of the open segment.
            memory: of the lanes.
            is_start_B: bool, lanes that begin a new piece with this segment, and must not see their memory.

        Returns:
            logits (B, T, V) and the update that `memory.commit` takes.
        """

    def remembering(self, horizons: Sequence[int]) -> AbstractContextManager[None]:
        """Use other horizons for the memories that are made and used inside the context; weights do not change.

        Raises:
            UserError: the network has no horizons, or these do not fit it.
        """
        raise UserError(f"{type(self).__name__} has no horizons: its memory cannot be changed by layer")

    def stacked_rows(self) -> dict[Tensor, tuple[int, ...]]:
        """Return, for each parameter that stacks several projections, their row counts; Muon treats them apart."""
        return {}

    @property
    def compiles_each_length(self) -> bool:
        """True if each new number of tokens is compiled first; prompts are then read in one length only."""
        return False

    @classmethod
    def rebuild(cls, config: dict[str, Any], **options: Any) -> Self:
        """Build the network that `config()` describes, with those options that its constructor takes."""
        parameters = inspect.signature(cls).parameters
        if "horizons" not in parameters and config.get("horizons", ()) is None:  # written by earlier versions
            config = {name: value for name, value in config.items() if name != "horizons"}
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        taken = {k: v for k, v in options.items() if k in cls.OPTIONS and (takes_any or k in parameters)}
        return cls(**config | taken)

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that rebuild this network: numbers, strings, lists; horizons expanded."""

    @abstractmethod
    def state_bytes(self, num_lanes: int, itemsize: int, *, decoding: bool = False) -> int:
        """Return the bytes that `init_memory` allocates for B lanes at `itemsize` bytes per number, by formula."""

    @abstractmethod
    def summary(self, rate: TokenRate | None = MAESTRO_RATE) -> str:
        """Describe the memory in a few lines, with seconds of music unless `rate` is None."""


def network_summary(backbone: Backbone, rate: TokenRate | None) -> str:
    """Return the summary of a network; a user's own may leave out the parameter `rate`."""
    return backbone.summary(rate) if inspect.signature(backbone.summary).parameters else backbone.summary()


def network_name(network: type[Backbone]) -> str:
    """Return the name of a network in checkpoints: the class name for ours, the class path for a user's own."""
    is_own = not network.__module__.startswith("dsmr.model.")
    return f"{network.__module__}.{network.__qualname__}" if is_own else network.__name__


def is_builtin(name: str) -> bool:
    """True if a name, as returned by `network_name`, is that of a network in `dsmr.model`."""
    return "." not in name


def build_on_meta(build: Callable[[], Built]) -> Built:
    """Build something on torch's meta device, for its sizes alone; on the CPU if its constructor reads its tensors."""
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):  # raised by torch for values that a meta tensor does not have
        return build()


def evaluation_copy(backbone: Backbone) -> Backbone:
    """Copy a network for evaluation: it shares the parameters, and its layers are not compiled."""
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    for module in backbone.modules():  # a user's network may store activations, which cannot be copied
        kept = (value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf)
        shared |= {id(value): value.detach() for value in kept}
    return copy.deepcopy(backbone, shared).eval()
