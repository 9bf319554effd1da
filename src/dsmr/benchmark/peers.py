"""Peers from PyPI that the benchmark runs beside our networks, at the same sizes and on the same tokens.

Shapes: B lanes, T segment, M memory, E model width, V vocabulary. Both come with the extra `bench`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dsmr import UserError


class UnfitError(UserError):
    """A peer that cannot be built at these sizes."""


class XTransformersXL(nn.Module):
    """x-transformers' Transformer-XL: the last M hidden states of every layer, detached, projected again each time.

    Its options are those that make it our network: flash attention, rotary positions, RMSNorm, gated SiLU MLP, tied
    embeddings, no biases.

    Args:
        vocab_size: V.
        segment_length: T.
        horizon: M of every layer.
        d_model: E.
        num_layers: of blocks.
        num_heads: of attention.
        hidden_width: of the gated MLP.

    Raises:
        ImportError: x-transformers is not installed.
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
        """A full memory, as it is in the middle of a piece: per layer (B, M, E)."""
        weight = next(self.parameters())
        shape = (num_lanes, self.horizon, self.d_model)
        return [torch.randn(shape, dtype=weight.dtype, device=weight.device) for _ in range(self.num_layers)]

    def forward(self, tokens_BT: Tensor, memory: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, T, V), and the next memory."""
        logits_BTV, memory = self.network(tokens_BT, mems=memory, return_mems=True)
        return logits_BTV, memory

    def begin_decoding(self, tokens_BM: Tensor) -> Any:
        """Its cache of keys and values after these tokens."""
        return self.network(tokens_BM, return_intermediates=True)[1]

    def decode(self, token_B1: Tensor, cache: Any) -> Tensor:
        """Logits of one more token, (B, 1, V)."""
        logits_B1V: Tensor = self.network(
            token_B1, cache=cache, input_not_include_cache=True, return_intermediates=True
        )[0]
        return logits_B1V


class PerceiverARPytorch(nn.Module):
    """perceiver-ar-pytorch: one cross-attention to M tokens, then self-attention over the segment.

    Args:
        vocab_size: V.
        segment_length: T.
        prefix_length: M.
        d_model: E.
        num_layers: of blocks, the cross-attention's included.
        num_heads: of attention.
        hidden_width: of a gated MLP with as many parameters as its plain one.

    Raises:
        ImportError: perceiver-ar-pytorch is not installed.
        UnfitError: heads that are narrower than what it rotates.
    """

    LEAST_HEAD_WIDTH = 32

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

        if d_model // num_heads < self.LEAST_HEAD_WIDTH:
            raise UnfitError(f"perceiver-ar-pytorch needs heads of width {self.LEAST_HEAD_WIDTH} or more")
        super().__init__()
        self.network = PerceiverAR(
            num_tokens=vocab_size,
            dim=d_model,
            depth=num_layers - 1,
            dim_head=d_model // num_heads,
            heads=num_heads,
            ff_mult=hidden_width * 3 / 2 / d_model,
            max_seq_len=prefix_length + segment_length,
            cross_attn_seq_len=prefix_length,
        )

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits of the last T of M + T tokens, (B, T, V)."""
        logits_BTV: Tensor = self.network(tokens_BS)
        return logits_BTV
