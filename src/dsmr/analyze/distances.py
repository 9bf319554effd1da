"""Attention by distance: histograms that are accumulated batch by batch, without storing score matrices.

Shapes: B lanes, T queries, K key/value heads, G = H / K, H heads, L layers, M slots, S keys, N classes of distances.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsmr.attention.visibility import Past, Visibility
from dsmr.batch import IGNORED, Segment
from dsmr.model.blocks import Block, Decoder

QUERIES_AT_ONCE = 64  # bounds the size of a score matrix


class AttentionDistances:
    """Attention mass by distance in tokens (`longest` at most), for every layer and head of a network."""

    def __init__(self, backbone: Decoder, longest: int) -> None:
        self.backbone = backbone
        self.starts = (0, *(2**k for k in range(longest.bit_length())))
        device = next(backbone.parameters()).device
        self.starts_N = torch.tensor(self.starts[1:], device=device)
        shape = (len(backbone.blocks), backbone.settings.num_heads, len(self.starts))
        self.mass_LHN = torch.zeros(shape, dtype=torch.float64, device=device)
        self.memory_LH = torch.zeros(shape[:2], dtype=torch.float64, device=device)
        self.num_queries = 0
        self._is_real_BT: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator["AttentionDistances"]:
        """Count every call of the layers inside the `with` block."""
        with ExitStack() as hooks:
            for number, block in enumerate(self.backbone.blocks):
                hooks.enter_context(block.register_forward_pre_hook(partial(self._count, number)))
            yield self

    def watch(self, batch: Segment) -> None:
        """Set which queries of the next batch count: those with a target."""
        self._is_real_BT = batch.targets_BT != IGNORED
        self.num_queries += int(self._is_real_BT.sum())

    def shares(self) -> Tensor:
        """Mean share of a query's attention that each class of distances receives, (L, H, N); sums to 1 over N."""
        return (self.mass_LHN / max(self.num_queries, 1)).cpu()

    def memory_shares(self) -> Tensor:
        """Mean share of a query's attention that memory receives, (L, H)."""
        return (self.memory_LH / max(self.num_queries, 1)).cpu()

    def _count(self, layer: int, block: Any, arguments: Sequence[Any]) -> None:
        x_BTE, rotation, past, visibility = arguments
        assert isinstance(block, Block)
        query_BHTD, key_BKTD, _ = block.project(x_BTE, rotation)
        assert self._is_real_BT is not None
        for first in range(0, query_BHTD.shape[2], QUERIES_AT_ONCE):
            queries = slice(first, first + QUERIES_AT_ONCE)
            weights_BHTS = attention_weights(query_BHTD, key_BKTD, past, visibility, queries, block.memory_gate)
            weights_BHTS = weights_BHTS * self._is_real_BT[:, None, queries, None]
            class_TS = torch.bucketize(distances(visibility, queries), self.starts_N, right=True)
            mass_HTS = weights_BHTS.sum(dim=0, dtype=torch.float64)
            self.mass_LHN[layer].index_add_(1, class_TS.flatten(), mass_HTS.flatten(1))
            self.memory_LH[layer] += mass_HTS[:, :, : len(visibility.ages_M)].sum(dim=(1, 2))


def distances(visibility: Visibility, queries: slice) -> Tensor:
    """Tokens from each query back to each key, (T, S); 0 for itself and for later tokens, which are masked."""
    position_T1 = visibility.position_T[queries, None]
    own_T = torch.arange(visibility.num_open + visibility.num_queries, device=position_T1.device)
    return torch.cat([position_T1 + visibility.ages_M, (position_T1 - own_T).clamp(min=0)], dim=1)


def attention_weights(
    query_BHTD: Tensor, key_BKTD: Tensor, past: Past, visibility: Visibility, queries: slice, gate_H: Tensor | None
) -> Tensor:
    """Softmax weights of some queries over all keys, (B, H, T, S), in at least float32."""
    query_BHTD = query_BHTD[:, :, queries]
    lanes, _, _, width = query_BHTD.shape
    key_BKSD = torch.cat([past.key, key_BKTD], dim=2)
    query_BKGTD = query_BHTD.view(lanes, key_BKSD.shape[1], -1, query_BHTD.shape[2], width)
    scores_BHTS = (query_BKGTD @ key_BKSD.mT[:, :, None] * width**-0.5).flatten(1, 2)
    if gate_H is not None:
        scores_BHTS[..., : len(visibility.ages_M)] += gate_H[:, None, None]
    scores_BHTS = scores_BHTS.masked_fill(~visibility.mask_B1TS[:, :, queries], -torch.inf)
    return scores_BHTS.softmax(dim=-1, dtype=torch.promote_types(scores_BHTS.dtype, torch.float32))
