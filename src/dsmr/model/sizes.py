"""Settings of the networks, each written once: the sizes of their layers, and how these are computed.

The constructors of both networks take every field below as a keyword: `--model.backbone.num_layers 4`.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from dsmr import UserError
from dsmr.attention import Backend

Compilation = bool | Literal["together"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the layers; a checkpoint keeps them, with None replaced by what it means.

    Attributes:
        d_model: model width E.
        num_layers: L.
        num_heads: query heads; the head width D is E / num_heads and must be even.
        num_kv_heads: key/value heads, a divisor of num_heads (grouped queries); None means as many.
        hidden_width: width of the gated MLP; None means 8/3 E, rounded up to a multiple of 64.
        dropout: probability, on embeddings and residual branches; never on attention weights.
        init_std: of embedding and linear layers; output projections get it divided by sqrt(2 L).

    Raises:
        UserError: sizes that do not fit together.
    """

    d_model: int = 512
    num_layers: int = 12
    num_heads: int = 8
    num_kv_heads: int | None = None
    hidden_width: int | None = None
    dropout: float = 0.1
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if min(self.d_model, self.num_layers, self.num_heads, self.kv_heads) < 1 or not 0 <= self.dropout < 1:
            raise UserError(
                f"d_model {self.d_model}, num_layers {self.num_layers}, num_heads {self.num_heads} and num_kv_heads "
                f"{self.num_kv_heads} must be at least 1, dropout {self.dropout} at least 0 and below 1"
            )
        if self.d_model % (2 * self.num_heads) or self.num_heads % self.kv_heads:
            raise UserError(
                f"d_model {self.d_model} must be a multiple of 2 * num_heads ({2 * self.num_heads}), and num_heads "
                f"{self.num_heads} a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.init_std < 0 or (self.hidden_width is not None and self.hidden_width < 1):
            raise UserError(
                f"init_std {self.init_std} must not be negative, and hidden_width {self.hidden_width} at least 1"
            )
        if self.hidden_width is None:
            object.__setattr__(self, "hidden_width", -(-self.d_model * 8 // (3 * 64)) * 64)

    @property
    def kv_heads(self) -> int:
        """K, key/value heads."""
        assert self.num_kv_heads is not None
        return self.num_kv_heads

    @property
    def mlp_width(self) -> int:
        """Width of the gated MLP."""
        assert self.hidden_width is not None
        return self.hidden_width

    @property
    def head_width(self) -> int:
        """D."""
        return self.d_model // self.num_heads

    @property
    def kv_width(self) -> int:
        """E_kv = K * D."""
        return self.kv_heads * self.head_width

    def as_dict(self) -> dict[str, Any]:
        """Return the sizes alone, as a checkpoint keeps them."""
        return {field.name: getattr(self, field.name) for field in fields(Sizes)}


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Ways to compute a network; every choice computes the same function.

    Attributes:
        attention: implementation of attention; `auto` selects the fastest for the device.
        activation_checkpointing: keep only the layers' inputs for backward, and recompute the rest.
        compile_blocks: compile every layer with torch.compile; `together` compiles all layers as one graph, which
            takes longer to compile and launches faster.

    Raises:
        UserError: an unknown implementation.
    """

    attention: Backend = "auto"
    activation_checkpointing: bool = False
    compile_blocks: Compilation = False

    def __post_init__(self) -> None:
        if self.attention not in get_args(Backend):
            raise UserError(f"attention {self.attention!r} is not one of {', '.join(get_args(Backend))}")


@dataclass(frozen=True, kw_only=True)
class Settings(Compute, Sizes):
    """Sizes of the layers, and how these are computed; see `Sizes` and `Compute`."""

    def __post_init__(self) -> None:
        Sizes.__post_init__(self)
        Compute.__post_init__(self)


COMPUTE_NAMES = tuple(field.name for field in fields(Compute))
"""Constructor arguments that change how a network is computed, not what: checkpoints leave them out."""
