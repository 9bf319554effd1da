"""Blocks: the stack of pre-norm layers between tied embeddings that both networks share.

Shapes: B lanes, T segment, H query heads, K key/value heads, D head width, E model width, F features, V vocabulary,
P prefix.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsmr import UserError
from dsmr.attention.backends import Backend, attend, compiles_each_length, prepare_visibility
from dsmr.attention.decode import TokenDecoder
from dsmr.attention.flex import allow_kernels
from dsmr.attention.fused import RMSNorm, gated_product, linear_few_rows, rms_norm, split_and_rotate, trains_on_cpu
from dsmr.attention.visibility import Past, Visibility
from dsmr.model.backbone import Backbone
from dsmr.model.memory import Memory
from dsmr.model.rotary import Rotation
from dsmr.model.sizes import COMPUTE_NAMES, Settings

KeysValues = tuple[Tensor, Tensor]


class Block(nn.Module):
    """One layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    memory_gate: nn.Parameter | None
    ORDER = ("attention_norm", "query_key_value", "output", "mlp_norm", "gate_up", "down")

    def __init__(self, settings: Settings, memory_gate: float | None = None) -> None:
        super().__init__()
        width, hidden_width = settings.d_model, settings.mlp_width
        gate_H = None if memory_gate is None else nn.Parameter(torch.full((settings.num_heads,), float(memory_gate)))
        self.register_parameter("memory_gate", gate_H)
        self.attention: Backend = settings.attention
        self.head_width = settings.head_width
        self.widths = [width, settings.kv_width, settings.kv_width]  # of queries, keys, values
        self.attention_norm = RMSNorm(width)
        self.query_key_value = nn.Linear(width, sum(self.widths), bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_norm = RMSNorm(width)
        self.gate_up = nn.Linear(width, 2 * hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(
        self, x_BTE: Tensor, rotation: Rotation, past: Past, visibility: Visibility
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's output (B, T, E) and the segment's rotated keys and values (B, K, T, D)."""
        query, key, value = self.project(x_BTE, rotation)
        attended_BHTD = attend(query, key, value, past, visibility, self.attention, self.memory_gate)
        x_BTE = x_BTE + self.dropout(self.output(attended_BHTD.transpose(1, 2).flatten(2)))
        return x_BTE + self.dropout(self.down(self.gate(self.gate_up(self.mlp_norm(x_BTE))))), key, value

    def project(self, x_BTE: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries (B, H, T, D), rotated keys and values (B, K, T, D)."""
        heads_BTF = self.query_key_value(self.attention_norm(x_BTE))
        counts = [width // self.head_width for width in self.widths]
        if trains_on_cpu(heads_BTF) and heads_BTF.dtype == rotation.cos_TD.dtype:
            return split_and_rotate(heads_BTF, rotation.cos_TD, rotation.sin_TD, *counts[:2])
        heads_BHTD = heads_BTF.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        rotated, value = heads_BHTD.split([counts[0] + counts[1], counts[2]], dim=1)
        query, key = rotation(rotated).split(counts[:2], dim=1)
        return query, key, value

    def gate(self, gate_up_BTF: Tensor) -> Tensor:
        """`silu(gate) * up` of the two halves of F."""
        if trains_on_cpu(gate_up_BTF):
            return gated_product(gate_up_BTF)
        gate, up = gate_up_BTF.chunk(2, dim=-1)
        return F.silu(gate) * up

    def keys_values(self, x_BPE: Tensor, rotation: Rotation) -> KeysValues:
        """Return only the rotated keys and the values of a layer's input, (B, K, P, D) each."""
        weight = self.query_key_value.weight[self.widths[0] :]
        parts = F.linear(self.attention_norm(x_BPE), weight).split(self.widths[1:], dim=-1)
        key, value = (part.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in parts)
        return rotation(key), value

    def decode(
        self, x_BE: Tensor, rotation: Rotation, past: Past, visibility: Visibility
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute `forward` for one token per lane without autograd, in as few operations as possible."""
        num_lanes, rotated_width = len(x_BE), self.widths[0] + self.widths[1]
        heads_BF = linear_few_rows(rms_norm(x_BE, self.attention_norm.weight), self.query_key_value.weight)
        heads_BHTD = heads_BF.view(num_lanes, -1, 1, self.head_width)
        rotated, value = heads_BHTD.tensor_split((rotated_width // self.head_width,), dim=1)
        query, key = rotation(rotated).tensor_split((self.widths[0] // self.head_width,), dim=1)
        attended_BHTD = attend(query, key, value, past, visibility, self.attention, self.memory_gate)
        x_BE = x_BE + linear_few_rows(attended_BHTD.view(num_lanes, -1), self.output.weight)
        gate, up = linear_few_rows(rms_norm(x_BE, self.mlp_norm.weight), self.gate_up.weight).chunk(2, dim=-1)
        return x_BE + linear_few_rows(F.silu(gate).mul_(up), self.down.weight), key, value

    def weights(self) -> tuple[Tensor, ...]:
        """Return all weights in the order of their use."""
        modules = self._modules  # the attribute access of nn.Module takes ten times as long
        return tuple(cast(nn.Module, modules[name])._parameters["weight"] for name in self.ORDER)  # type: ignore[misc]


class Stack(nn.ModuleList):
    """All layers, bottom to top."""

    def forward(
        self,
        x_BTE: Tensor,
        rotation: Rotation,
        pasts: Sequence[Past],
        visibilities: Sequence[Visibility],
        recompute: bool,
    ) -> tuple[Tensor, list[KeysValues]]:
        """Return the last layer's output (B, T, E), and every layer's rotated keys and values.

        Args:
            x_BTE: embedded tokens.
            rotation: of their positions.
            pasts: keys and values of each layer from before the tokens.
            visibilities: of each layer.
            recompute: keep only the layers' inputs for backward.
        """
        new: list[KeysValues] = []
        for block, past, visibility in zip(cast(Sequence[Block], self), pasts, visibilities, strict=True):
            inputs = (x_BTE, rotation, past, visibility)
            x_BTE, key, value = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
            new.append((key, value))
        return x_BTE, new


class Decoder(Backbone):
    """Embedding, layers, norm, and the embedding again for the logits. Subclasses add what is remembered.

    Args:
        vocab_size: V.
        segment_length: T, tokens per lane and pass.
        memory_gate: initial bias of each head on its memory; None for none.
        settings: sizes and how to compute, see `dsmr.model.sizes.Settings`.

    Raises:
        UserError: settings that do not fit together.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = COMPUTE_NAMES

    def __init__(
        self, vocab_size: int, segment_length: int, *, memory_gate: float | None = None, **settings: Any
    ) -> None:
        super().__init__()
        self.settings = Settings(**settings)
        if min(vocab_size, segment_length) < 1:
            raise UserError(f"vocab_size {vocab_size} and segment_length {segment_length} must be at least 1")
        self.vocab_size, self.segment_length = vocab_size, segment_length
        self.is_gated = memory_gate is not None
        self.embedding = nn.Embedding(vocab_size, self.settings.d_model)
        self.blocks = Stack(Block(self.settings, memory_gate) for _ in range(self.settings.num_layers))
        self.norm = RMSNorm(self.settings.d_model)
        self.dropout = nn.Dropout(self.settings.dropout)
        self._token_decoder = TokenDecoder()
        self._init_weights(self.settings.init_std)
        if self.settings.compile_blocks:
            allow_kernels()
            for compiled in [self.blocks] if self.settings.compile_blocks == "together" else self.blocks:
                compiled.compile(dynamic=False)

    def _init_weights(self, std: float) -> None:
        nn.init.normal_(self.embedding.weight, std=std)
        for name, parameter in self.blocks.named_parameters():
            if parameter.dim() == 2:
                is_output = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=std / (2 * len(self.blocks)) ** 0.5 if is_output else std)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that rebuild this network."""
        return {"vocab_size": self.vocab_size, "segment_length": self.segment_length, **self.settings.as_dict()}

    @property
    def compiles_each_length(self) -> bool:
        """True with compiled attention or compiled layers; see `Backbone.compiles_each_length`."""
        compiled = any(module._compiled_call_impl is not None for module in (self.blocks, *self.blocks))
        return compiled or compiles_each_length(self.settings.attention, self.embedding.weight.device.type)

    def stacked_rows(self) -> dict[Tensor, tuple[int, ...]]:
        """Query, key and value; gate and up: see `Backbone.stacked_rows`."""
        rows: dict[Tensor, tuple[int, ...]] = {}
        for block in cast(Sequence[Block], self.blocks):
            rows[block.query_key_value.weight] = tuple(block.widths)
            rows[block.gate_up.weight] = (block.gate_up.out_features // 2,) * 2
        return rows

    def extra_repr(self) -> str:
        """Show the summary where the network is printed."""
        return self.summary()

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of keys and values: autocast's where it is on, else the weights'."""
        weight = self.embedding.weight
        device = weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

    def lengths_before(self, tokens_BT: Tensor, memory: Memory, is_start_B: Tensor | None) -> Tensor:
        """Return how many tokens of its piece each lane has before the segment, (B,): 0 where a piece begins.

        Raises:
            UserError: more tokens than the segment has room for, or a piece that begins inside a segment.
        """
        room = self.segment_length - memory.open_length
        if not 0 < tokens_BT.shape[1] <= room:
            raise UserError(f"{tokens_BT.shape[1]} tokens do not fit: the segment has room for 1 to {room}")
        if is_start_B is None:
            return memory.length_B
        if memory.open_length:
            raise UserError("a piece can begin only at a segment's start; inside it, give is_start_B=None")
        return torch.where(is_start_B, 0, memory.length_B)

    def run_layers(
        self, tokens_BT: Tensor, clock: int, pasts: Sequence[Past], visibilities: Sequence[Visibility]
    ) -> tuple[Tensor, list[KeysValues]]:
        """Run all layers over tokens that begin at `clock`.

        Returns:
            logits (B, T, V), and per layer the tokens' own rotated keys and values, (B, K, T, D).
        """
        x_BTE = self.dropout(self.embedding(tokens_BT))
        if self._is_decoding(x_BTE):
            return self._decode_token(x_BTE[:, 0], clock, pasts, visibilities)
        rotation = Rotation.at(clock, tokens_BT.shape[1], self.settings.head_width, like=self.embedding.weight)
        for visibility in visibilities:
            prepare_visibility(visibility, self.settings.attention)
        recompute = self.settings.activation_checkpointing and torch.is_grad_enabled()
        x_BTE, new = self.blocks(x_BTE, rotation, pasts, visibilities, recompute)
        return F.linear(self.norm(x_BTE), self.embedding.weight), new

    def _is_decoding(self, x_BTE: Tensor) -> bool:
        """True for a single token per lane, on the CPU in one precision: there, every call of torch counts."""
        on_cpu = x_BTE.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        return x_BTE.shape[1] == 1 and on_cpu and not self.training and not torch.is_grad_enabled()

    def _decode_token(
        self, x_BE: Tensor, clock: int, pasts: Sequence[Past], visibilities: Sequence[Visibility]
    ) -> tuple[Tensor, list[KeysValues]]:
        rotation = Rotation.one(clock, self.settings.head_width, like=self.embedding.weight)
        blocks, new = cast(Sequence[Block], self.blocks), list[KeysValues]()
        is_plain = self.settings.attention in ("auto", "merged") and not self.is_gated
        if is_plain and self._token_decoder.supports(x_BE):
            weights = [block.weights() for block in blocks]
            tables = rotation.cos_TD, rotation.sin_TD
            x_BE, new = self._token_decoder(x_BE, weights, *tables, pasts, visibilities)
        else:
            for block, past, visibility in zip(blocks, pasts, visibilities, strict=True):
                x_BE, key, value = block.decode(x_BE, rotation, past, visibility)
                new.append((key, value))
        return linear_few_rows(rms_norm(x_BE, self.norm.weight), self.embedding.weight)[:, None], new
