"""The recurrent Transformer: Transformer-XL's recurrence with a memory horizon per layer.

Shapes: B lanes, T segment, H heads, D head width, E model width, V vocabulary, S = M + T keys.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from dsmr.model.attention import Rule, attend, visible_B1TS
from dsmr.model.backbone import Backbone
from dsmr.model.horizons import Schedule, check_horizons, expand
from dsmr.model.memory import Memory, Update


class RecurrentTransformer(Backbone):
    """Pre-norm decoder: RMSNorm, rotary positions, gated MLP, tied embeddings, one ring memory per layer.

    Our layer l is the paper's layer with a window of H_l cached states (Depth-Structured Music Recurrence,
    arXiv 2602.19816); like Transformer-XL (arXiv 1901.02860) it attends to detached states of past segments,
    but to the keys and values that were computed then, so that nothing is projected twice.

    Args:
        vocab_size: V.
        horizons: H_l in tokens, bottom to top, one for each layer; as a list, a text or a schedule.
        segment_length: T, tokens per lane and pass.
        d_model: E.
        num_layers: L.
        num_heads: query heads; E / num_heads is the head width D, which must be even.
        num_kv_heads: key/value heads, a divisor of `num_heads` (grouped queries); None means as many.
        hidden_width: width of the gated MLP; None means 8/3 E, rounded up to a multiple of 64.
        dropout: probability on embeddings and residual branches, never on attention weights.
        memory_block: tokens; divides T and every horizon.
        init_std: of the embedding and the linear layers; output projections get it over sqrt(2 L).

    Raises:
        ValueError: horizons, heads or widths that do not fit together.
    """

    rule: Rule = "boundary"

    def __init__(
        self,
        vocab_size: int,
        horizons: Schedule | str | Sequence[int],
        segment_length: int,
        *,
        d_model: int = 512,
        num_layers: int = 12,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        hidden_width: int | None = None,
        dropout: float = 0.1,
        memory_block: int = 128,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        least = min(vocab_size, d_model, num_layers, num_heads, num_kv_heads)
        if least < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"d_model {d_model}, num_layers {num_layers}, num_heads {num_heads} and num_kv_heads {num_kv_heads} "
                f"must be at least 1, dropout {dropout} at least 0 and below 1"
            )
        hidden_width = -(-d_model * 8 // (3 * 64)) * 64 if hidden_width is None else hidden_width
        self.horizons = expand(horizons, num_layers)
        if d_model % (2 * num_heads) or num_heads % num_kv_heads:
            raise ValueError(
                f"d_model {d_model} must be a multiple of 2 * num_heads ({2 * num_heads}), and num_heads "
                f"{num_heads} a multiple of num_kv_heads ({num_kv_heads})"
            )
        check_horizons(self.horizons, segment_length, memory_block)
        self.vocab_size, self.segment_length = vocab_size, segment_length
        self.num_kv_heads, self.head_width = num_kv_heads, d_model // num_heads
        self._config = {
            "vocab_size": vocab_size,
            "horizons": list(self.horizons),
            "segment_length": segment_length,
            "d_model": d_model,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "hidden_width": hidden_width,
            "dropout": dropout,
            "memory_block": memory_block,
            "init_std": init_std,
        }
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(
            Block(d_model, num_heads, num_kv_heads, hidden_width, dropout) for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self._init_weights(init_std)

    def _init_weights(self, std: float) -> None:
        nn.init.normal_(self.embedding.weight, std=std)
        for name, parameter in self.blocks.named_parameters():
            if parameter.dim() == 2:
                is_output = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=std / (2 * len(self.blocks)) ** 0.5 if is_output else std)

    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this network."""
        return dict(self._config)

    def init_memory(self, num_lanes: int, *, decoding: bool = False) -> Memory:
        """Make an empty memory in the compute precision: autocast's where it is on, else the weights'."""
        weight = self.embedding.weight
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return Memory(
            self.horizons,
            num_lanes=num_lanes,
            num_kv_heads=self.num_kv_heads,
            head_width=self.head_width,
            segment_length=self.segment_length,
            dtype=dtype,
            device=weight.device,
            decoding=decoding,
        )

    def forward(self, tokens_BT: Tensor, memory: Memory, is_start_B: Tensor | None = None) -> tuple[Tensor, Update]:
        """Read tokens after what `memory` holds; see `Backbone.forward`.

        Raises:
            ValueError: more tokens than the segment has room for, or a piece that begins inside a segment.
        """
        num_tokens = tokens_BT.shape[1]
        if not 0 < num_tokens <= self.segment_length - memory.open_length:
            raise ValueError(
                f"{num_tokens} tokens do not fit: the segment has room for 1 to "
                f"{self.segment_length - memory.open_length}"
            )
        length_B = memory.length_B
        if is_start_B is not None:
            if memory.open_length:
                raise ValueError("a piece can begin only at a segment's start; give is_start_B=None inside it")
            length_B = torch.where(is_start_B, 0, length_B)
        clock = memory.clock + memory.open_length
        rotation = Rotation.at(clock, num_tokens, self.head_width, like=self.embedding.weight)
        masks: dict[int, Tensor] = {}
        closes = num_tokens == self.segment_length
        keys, values = [], []
        x_BTE = self.dropout(self.embedding(tokens_BT))
        for layer, (block, horizon) in enumerate(zip(self.blocks, self.horizons, strict=True)):
            if horizon not in masks:
                masks[horizon] = visible_B1TS(memory, layer, length_B, num_tokens)
            x_BTE, key, value = block(x_BTE, rotation, memory.read(layer), masks[horizon])
            kept = min(horizon, num_tokens) if closes else num_tokens
            keys.append(key.detach()[:, :, num_tokens - kept :])
            values.append(value.detach()[:, :, num_tokens - kept :])
        logits_BTV = F.linear(self.norm(x_BTE), self.embedding.weight)
        return logits_BTV, Update(keys, values, length_B, num_tokens)


class Block(nn.Module):
    """One layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, d_model: int, num_heads: int, num_kv_heads: int, hidden_width: int, dropout: float) -> None:
        super().__init__()
        self.head_width = d_model // num_heads
        self.widths = [d_model, num_kv_heads * self.head_width, num_kv_heads * self.head_width]
        self.attention_norm = nn.RMSNorm(d_model)
        self.query_key_value = nn.Linear(d_model, sum(self.widths), bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.mlp_norm = nn.RMSNorm(d_model)
        self.gate_up = nn.Linear(d_model, 2 * hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BTE: Tensor, rotation: "Rotation", memory: tuple[Tensor, Tensor], mask_B1TS: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's output (B, T, E) and the segment's rotated keys and values (B, H, T, D)."""
        heads = self.query_key_value(self.attention_norm(x_BTE)).split(self.widths, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in heads)
        query, key = rotation(query), rotation(key)
        memory_key, memory_value = memory
        attended_BHTD = attend(query, key, value, memory_key, memory_value, mask_B1TS)
        x_BTE = x_BTE + self.dropout(self.output(attended_BHTD.transpose(1, 2).flatten(2)))
        gate, up = self.gate_up(self.mlp_norm(x_BTE)).chunk(2, dim=-1)
        return x_BTE + self.dropout(self.down(F.silu(gate) * up)), key, value


class Rotation:
    """Rotary position embedding (arXiv 2104.09864) at given clock positions, the two halves of D being paired.

    Angles are computed in float64 on the host: in float32 they err by 2e-2 at a clock of one million tokens.
    The rotation itself is at least float32 and gives back the dtype that it was given.
    """

    BASE = 10_000.0

    def __init__(self, cos_TD: Tensor, sin_TD: Tensor) -> None:
        self.cos_TD, self.sin_TD = cos_TD, sin_TD

    @classmethod
    def at(cls, start: int, num_tokens: int, head_width: int, like: Tensor) -> "Rotation":
        """Tables for positions start .. start + num_tokens - 1, on `like`'s device, at least float32."""
        frequencies = cls.BASE ** -(torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
        angles = torch.outer(torch.arange(start, start + num_tokens, dtype=torch.float64), frequencies)
        tables = torch.stack([angles.cos(), angles.sin()])
        cos_TD, sin_TD = tables.to(torch.promote_types(like.dtype, torch.float32)).to(like.device)
        return cls(cos_TD, sin_TD)

    def __call__(self, x_BHTD: Tensor) -> Tensor:
        """Rotate queries or keys."""
        cos, sin = self.cos_TD, self.sin_TD
        first, second = x_BHTD.to(cos.dtype).chunk(2, dim=-1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return rotated.to(x_BHTD.dtype)
