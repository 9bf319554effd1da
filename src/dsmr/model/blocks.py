"""What both backbones are made of: a stack of pre-norm blocks between tied embeddings, with rotary positions.

Shapes: B lanes, T segment, H heads, D head width, E model width, V vocabulary, S = M + T keys.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsmr import UserError
from dsmr.attention.attend import Form, attend, is_compiled, prepare
from dsmr.attention.decode import Stepper
from dsmr.attention.flex import allow_kernels
from dsmr.attention.fused import RMSNorm, few_rows, gated, normalised, records, split_and_rotate
from dsmr.attention.visibility import Past, View
from dsmr.model.backbone import Backbone
from dsmr.model.memory import Memory

KeysValues = tuple[Tensor, Tensor]
Compilation = bool | Literal["together"]
SIZES = ("d_model", "num_layers", "num_heads", "num_kv_heads", "hidden_width", "dropout", "init_std")
STRETCH = 512  # positions whose rotary tables are kept while decoding


class Decoder(Backbone):
    """Pre-norm decoder: RMSNorm, rotary positions, gated MLP, tied embeddings; its subclasses say what is remembered.

    Args:
        vocab_size: V.
        segment_length: T, tokens per lane and pass.
        d_model: E.
        num_layers: L.
        num_heads: query heads; E / num_heads is the head width D, which must be even.
        num_kv_heads: key/value heads, a divisor of `num_heads` (grouped queries); None means as many.
        hidden_width: width of the gated MLP; None means 8/3 E, rounded up to a multiple of 64.
        dropout: probability on embeddings and residual branches, never on attention weights.
        init_std: of the embedding and the linear layers; output projections get it over sqrt(2 L).
        attention: the form that computes it, see `dsmr.attention.attend.attend`; all compute the same.
        activation_checkpointing: keep only the layers' inputs for backward and compute the rest again.
        compile_blocks: compile every layer (torch.compile), or all layers `together` as one graph, which takes as many
            times as long and launches sooner.
        memory_gate: where the learned bias of each head on what is remembered begins; None for none.

    Raises:
        UserError: heads or widths that do not fit together.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("attention", "activation_checkpointing", "compile_blocks")
    memory_block: int = 1  # tokens; divides every horizon

    def __init__(
        self,
        vocab_size: int,
        segment_length: int,
        *,
        d_model: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None,
        hidden_width: int | None,
        dropout: float,
        init_std: float,
        attention: Form,
        activation_checkpointing: bool,
        compile_blocks: Compilation,
        memory_gate: float | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        least = min(vocab_size, segment_length, d_model, num_layers, num_heads, num_kv_heads)
        if least < 1 or not 0 <= dropout < 1:
            raise UserError(
                f"segment_length {segment_length}, d_model {d_model}, num_layers {num_layers}, num_heads {num_heads} "
                f"and num_kv_heads {num_kv_heads} must be at least 1, dropout {dropout} at least 0 and below 1"
            )
        if attention not in get_args(Form):
            raise UserError(f"attention {attention!r} is not one of {', '.join(get_args(Form))}")
        if d_model % (2 * num_heads) or num_heads % num_kv_heads:
            raise UserError(
                f"d_model {d_model} must be a multiple of 2 * num_heads ({2 * num_heads}), and num_heads "
                f"{num_heads} a multiple of num_kv_heads ({num_kv_heads})"
            )
        if init_std < 0 or (hidden_width is not None and hidden_width < 1):
            raise UserError(f"init_std {init_std} must not be below 0, nor hidden_width {hidden_width} below 1")
        hidden_width = -(-d_model * 8 // (3 * 64)) * 64 if hidden_width is None else hidden_width
        self.vocab_size, self.segment_length = vocab_size, segment_length
        self.num_kv_heads, self.head_width = num_kv_heads, d_model // num_heads
        self._config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "segment_length": segment_length,
            "d_model": d_model,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "hidden_width": hidden_width,
            "dropout": dropout,
            "init_std": init_std,
        }
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = Stack(
            Block(d_model, num_heads, num_kv_heads, hidden_width, dropout, attention, memory_gate)
            for _ in range(num_layers)
        )
        self.norm = RMSNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.attention: Form = attention
        self.activation_checkpointing, self.compile_blocks = activation_checkpointing, compile_blocks
        self._stepper, self.is_gated = Stepper(), memory_gate is not None
        self._init_weights(init_std)
        if compile_blocks:
            allow_kernels()
            for compiled in [self.blocks] if compile_blocks == "together" else self.blocks:
                compiled.compile(dynamic=False)

    def _init_weights(self, std: float) -> None:
        nn.init.normal_(self.embedding.weight, std=std)
        for name, parameter in self.blocks.named_parameters():
            if parameter.dim() == 2:
                is_output = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=std / (2 * len(self.blocks)) ** 0.5 if is_output else std)

    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this network."""
        return dict(self._config)

    def options(self) -> dict[str, Any]:
        """Constructor arguments that say how it is computed, not what: no part of `config`."""
        return {name: getattr(self, name) for name in Decoder.OPTIONS}

    def sizes(self) -> dict[str, Any]:
        """Give the layers' sizes by name (`SIZES`), whatever the constructor of a derived network calls them."""
        return {name: self._config[name] for name in SIZES}

    @property
    def compiles_each_length(self) -> bool:
        """True with compiled attention or compiled layers; see `Backbone.compiles_each_length`."""
        compiled = any(module._compiled_call_impl is not None for module in (self.blocks, *self.blocks))
        return compiled or is_compiled(self.attention, self.embedding.weight.device.type)

    def stacked_rows(self) -> dict[Tensor, tuple[int, ...]]:
        """Query, key and value; gate and up: see `Backbone.stacked_rows`."""
        rows: dict[Tensor, tuple[int, ...]] = {}
        for block in cast(Sequence[Block], self.blocks):
            rows[block.query_key_value.weight] = tuple(block.widths)
            rows[block.gate_up.weight] = (block.gate_up.out_features // 2,) * 2
        return rows

    def extra_repr(self) -> str:
        """The summary, where the network is printed."""
        return self.summary()

    @property
    def kv_width(self) -> int:
        """E_kv, key/value heads times head width."""
        return self.num_kv_heads * self.head_width

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of keys and values: autocast's where it is on, else the weights'."""
        weight = self.embedding.weight
        device = weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

    def begin(self, tokens_BT: Tensor, memory: Memory, is_start_B: Tensor | None) -> Tensor:
        """How many tokens of its piece each lane has before the segment, (B,): 0 where a piece begins.

        Raises:
            UserError: more tokens than the segment has room for, or a piece that begins inside a segment.
        """
        room = self.segment_length - memory.open_length
        if not 0 < tokens_BT.shape[1] <= room:
            raise UserError(f"{tokens_BT.shape[1]} tokens do not fit: the segment has room for 1 to {room}")
        if is_start_B is None:
            return memory.length_B
        if memory.open_length:
            raise UserError("a piece can begin only at a segment's start; give is_start_B=None inside it")
        return torch.where(is_start_B, 0, memory.length_B)

    def run(
        self, tokens_BT: Tensor, clock: int, pasts: Sequence[Past], views: Sequence[View]
    ) -> tuple[Tensor, list[KeysValues]]:
        """All layers over tokens that begin at `clock`, each with its past and its view of it.

        Returns:
            logits (B, T, V), and per layer the tokens' own rotated keys and values, (B, H, T, D).
        """
        new: list[KeysValues] = []
        x_BTE = self.dropout(self.embedding(tokens_BT))
        if self.is_step(x_BTE):
            rotation, x_BE = Rotation.one(clock, self.head_width, like=self.embedding.weight), x_BTE[:, 0]
            blocks = cast(Sequence[Block], self.blocks)
            if self.attention in ("auto", "merged") and not self.is_gated and self._stepper.can(x_BE):
                x_BE, new = self._stepper(x_BE, blocks, rotation, pasts, views)
            else:
                for block, past, view in zip(blocks, pasts, views, strict=True):
                    x_BE, key, value = block.step(x_BE, rotation, past, view)
                    new.append((key, value))
            return few_rows(normalised(x_BE, self.norm.weight), self.embedding.weight)[:, None], new
        rotation = Rotation.at(clock, tokens_BT.shape[1], self.head_width, like=self.embedding.weight)
        for view in views:
            prepare(view, self.attention)
        again = self.activation_checkpointing and torch.is_grad_enabled()
        x_BTE, new = self.blocks(x_BTE, rotation, pasts, views, again)
        return F.linear(self.norm(x_BTE), self.embedding.weight), new

    def is_step(self, x_BTE: Tensor) -> bool:
        """Whether this is a single token per lane, on the CPU in one precision: decoding, where every call counts."""
        on_cpu = x_BTE.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        return x_BTE.shape[1] == 1 and on_cpu and not self.training and not torch.is_grad_enabled()


class Stack(nn.ModuleList):
    """All layers, one after another."""

    def forward(
        self, x_BTE: Tensor, rotation: "Rotation", pasts: Sequence[Past], views: Sequence[View], again: bool
    ) -> tuple[Tensor, list[KeysValues]]:
        """The last layer's output (B, T, E), and every layer's rotated keys and values; see `Block.forward`.

        Args:
            x_BTE: embedded tokens.
            rotation: of their positions.
            pasts: of each layer.
            views: of each layer's past.
            again: keep only the layers' inputs for backward.
        """
        new: list[KeysValues] = []
        for block, past, view in zip(cast(Sequence[Block], self), pasts, views, strict=True):
            given = (x_BTE, rotation, past, view)
            x_BTE, key, value = checkpoint(block, *given, use_reentrant=False) if again else block(*given)
            new.append((key, value))
        return x_BTE, new


class Block(nn.Module):
    """One layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    memory_gate: nn.Parameter | None
    ORDER = ("attention_norm", "query_key_value", "output", "mlp_norm", "gate_up", "down")

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        hidden_width: int,
        dropout: float,
        attention: Form,
        memory_gate: float | None = None,
    ) -> None:
        super().__init__()
        gate_H = None if memory_gate is None else nn.Parameter(torch.full((num_heads,), float(memory_gate)))
        self.register_parameter("memory_gate", gate_H)
        self.attention: Form = attention
        self.head_width = d_model // num_heads
        self.widths = [d_model, num_kv_heads * self.head_width, num_kv_heads * self.head_width]
        self.attention_norm = RMSNorm(d_model)
        self.query_key_value = nn.Linear(d_model, sum(self.widths), bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.mlp_norm = RMSNorm(d_model)
        self.gate_up = nn.Linear(d_model, 2 * hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTE: Tensor, rotation: "Rotation", past: Past, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's output (B, T, E) and the segment's rotated keys and values (B, H, T, D)."""
        query, key, value = self.project(x_BTE, rotation)
        attended_BHTD = attend(query, key, value, past, view, self.attention, self.memory_gate)
        x_BTE = x_BTE + self.dropout(self.output(attended_BHTD.transpose(1, 2).flatten(2)))
        return x_BTE + self.dropout(self.down(self.gate(self.gate_up(self.mlp_norm(x_BTE))))), key, value

    def project(self, x_BTE: Tensor, rotation: "Rotation") -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: (B, H, T, D), with as many heads as each has."""
        heads_BTF = self.query_key_value(self.attention_norm(x_BTE))
        widths = [width // self.head_width for width in self.widths]
        if records(heads_BTF) and heads_BTF.dtype == rotation.cos_TD.dtype:
            return split_and_rotate(heads_BTF, rotation.cos_TD, rotation.sin_TD, *widths[:2])
        heads_BHTD = heads_BTF.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        rotated, value = heads_BHTD.split([widths[0] + widths[1], widths[2]], dim=1)
        query, key = rotation(rotated).split(widths[:2], dim=1)
        return query, key, value

    def step(self, x_BE: Tensor, rotation: "Rotation", past: Past, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` does, for one token per lane without autograd, in as few operations as it takes."""
        num_lanes, rotated_width = len(x_BE), self.widths[0] + self.widths[1]
        heads_BF = few_rows(normalised(x_BE, self.attention_norm.weight), self.query_key_value.weight)
        heads_BHTD = heads_BF.view(num_lanes, -1, 1, self.head_width)
        rotated, value = heads_BHTD.tensor_split((rotated_width // self.head_width,), dim=1)
        query, key = rotation(rotated).tensor_split((self.widths[0] // self.head_width,), dim=1)
        attended_BHTD = attend(query, key, value, past, view, self.attention, self.memory_gate)
        x_BE = x_BE + few_rows(attended_BHTD.view(num_lanes, -1), self.output.weight)
        gate, up = few_rows(normalised(x_BE, self.mlp_norm.weight), self.gate_up.weight).chunk(2, dim=-1)
        return x_BE + few_rows(F.silu(gate).mul_(up), self.down.weight), key, value

    def weights(self) -> tuple[Tensor, ...]:
        """All of them, in the order of their use."""
        modules = self._modules  # attributes of modules take ten times as long
        return tuple(cast(nn.Module, modules[name])._parameters["weight"] for name in self.ORDER)  # type: ignore[misc]

    def gate(self, gate_up_BTF: Tensor) -> Tensor:
        """`silu(gate) * up`, of the two halves of what is given."""
        if records(gate_up_BTF):
            return gated(gate_up_BTF)
        gate, up = gate_up_BTF.chunk(2, dim=-1)
        return F.silu(gate) * up

    def keys_values(self, x_BME: Tensor, rotation: "Rotation") -> KeysValues:
        """Only the rotated keys and values of a layer's input, (B, H, M, D) each."""
        weight = self.query_key_value.weight[self.widths[0] :]
        parts = F.linear(self.attention_norm(x_BME), weight).split(self.widths[1:], dim=-1)
        key, value = (part.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in parts)
        return rotation(key), value


class Rotation:
    """Rotary position embedding (arXiv 2104.09864) at given clock positions, the two halves of D being paired.

    Angles are computed in float64: in float32 they err by 2e-2 at a clock of one million tokens.
    The rotation itself is at least float32 and gives back the dtype that it was given.
    """

    BASE = 10_000.0

    def __init__(self, cos_TD: Tensor, sin_TD: Tensor) -> None:
        self.cos_TD, self.sin_TD = cos_TD, sin_TD

    @classmethod
    def at(cls, start: int, num_tokens: int, head_width: int, like: Tensor) -> "Rotation":
        """Tables for positions start .. start + num_tokens - 1, on `like`'s device, at least float32."""
        on: dict[str, Any] = {"dtype": torch.float64, "device": like.device if like.device.type == "cuda" else "cpu"}
        frequencies = cls.BASE ** -(torch.arange(0, head_width, 2, **on) / head_width)
        angles = torch.outer(torch.arange(start, start + num_tokens, **on), frequencies)
        cos, sin = angles.cos(), angles.sin()
        tables = torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])
        cos_TD, sin_TD = tables.to(torch.promote_types(like.dtype, torch.float32)).to(like.device)
        return cls(cos_TD, sin_TD)

    @classmethod
    def one(cls, position: int, head_width: int, like: Tensor) -> "Rotation":
        """Tables for a single position, out of those of a stretch of positions that are kept for the next ones."""
        first = position // STRETCH * STRETCH
        tables = _stretch(first, head_width, like.dtype, like.device)
        here = slice(position - first, position - first + 1)
        return cls(tables.cos_TD[here], tables.sin_TD[here])

    def __call__(self, x_BHTD: Tensor) -> Tensor:
        """Rotate queries or keys."""
        x = x_BHTD.to(self.cos_TD.dtype)
        swapped = x.roll(x.shape[-1] // 2, dims=-1)
        return torch.addcmul(x * self.cos_TD, swapped, self.sin_TD).to(x_BHTD.dtype)


@lru_cache(maxsize=2)
def _stretch(first: int, head_width: int, dtype: torch.dtype, device: torch.device) -> Rotation:
    return Rotation.at(first, STRETCH, head_width, like=torch.empty(0, dtype=dtype, device=device))
