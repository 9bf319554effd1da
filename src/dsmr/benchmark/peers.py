"""Networks from other packages, benchmarked at our sizes and on the same tokens.

Shapes: B lanes, T segment, M memory, E model width, V vocabulary. Both are installed by the extra `bench`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dsmr import UserError


class UnfitError(UserError):
    """The peer cannot be built at these sizes."""


class XTransformersXL(nn.Module):
    """Transformer-XL of x-transformers: each layer keeps its last M hidden states, detached, and projects them again.

    Its options are set to match our network: flash attention, rotary positions, RMSNorm, gated SiLU MLP, tied
    embeddings, no biases.
    """

    def __init__(
        self,
        vocab_size: int,
        segment_length: int,
        horizon: int,
        *,
        d_model: int,
        num_layers: int,
        num_heads: int,
        hidden_width: int,
    ) -> None:
        from x_transformers import Decoder, TransformerWrapper

        super().__init__()
        self.horizon, self.d_model, self.num_layers = horizon, d_model, num_layers
        self.network = TransformerWrapper(
            num_tokens=vocab_size,
            max_seq_len=segment_length,
            max_mem_len=horizon,
            tie_embedding=True,
            use_abs_pos_emb=False,
            attn_layers=Decoder(
                dim=d_model,
                depth=num_layers,
                heads=num_heads,
                attn_dim_head=d_model // num_heads,
                attn_flash=True,
                rotary_pos_emb=True,
                use_rmsnorm=True,
                ff_glu=True,
                ff_swish=True,
                ff_no_bias=True,
                ff_mult=hidden_width / d_model,
            ),
        )

    def init_memory(self, num_lanes: int) -> list[Tensor]:
        """Create a full memory, as in the middle of a piece: (B, M, E) per layer."""
        weight = next(self.parameters())
        shape = (num_lanes, self.horizon, self.d_model)
        return [torch.randn(shape, dtype=weight.dtype, device=weight.device) for _ in range(self.num_layers)]

    def forward(self, tokens_BT: Tensor, memory: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return logits (B, T, V) and the next memory."""
        return self.network(tokens_BT, mems=memory, return_mems=True)

    def begin_decoding(self, tokens_BM: Tensor) -> Any:
        """Return the cache of keys and values after these tokens."""
        return self.network(tokens_BM, return_intermediates=True)[1]

    def decode(self, token_B1: Tensor, cache: Any) -> Tensor:
        """Return logits of one more token, (B, 1, V)."""
        return self.network(token_B1, cache=cache, input_not_include_cache=True, return_intermediates=True)[0]


class PerceiverARPytorch(nn.Module):
    """Perceiver AR of perceiver-ar-pytorch: a cross-attention to M tokens, then self-attention over the segment."""

    MIN_HEAD_WIDTH = 32  # that of its rotary embedding; narrower heads raise UnfitError

    def __init__(
        self,
        vocab_size: int,
        segment_length: int,
        prefix_length: int,
        *,
        d_model: int,
        num_layers: int,
        num_heads: int,
        hidden_width: int,
    ) -> None:
        from perceiver_ar_pytorch import PerceiverAR

        if d_model // num_heads < self.MIN_HEAD_WIDTH:
            raise UnfitError(f"perceiver-ar-pytorch needs heads of width {self.MIN_HEAD_WIDTH} or more")
        super().__init__()
        self.network = PerceiverAR(
            num_tokens=vocab_size,
            dim=d_model,
            depth=num_layers - 1,
            dim_head=d_model // num_heads,
            heads=num_heads,
            ff_mult=hidden_width * 3 / 2 / d_model,  # two matrices in place of the gated MLP's three
            max_seq_len=prefix_length + segment_length,
            cross_attn_seq_len=prefix_length,
        )

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Return logits of the last T of M + T tokens, (B, T, V)."""
        return self.network(tokens_BS)
