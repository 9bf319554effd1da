"""Attention over memory and segment: one function, of which this is the reference form.

Shapes: B lanes, T queries, M memory (ring slots and, while decoding, the open tokens), S = M + T, H heads,
D head width. Every other backend has to equal this one, forward and backward.
"""

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dsmr.model.memory import Memory

Rule = Literal["boundary"]


def visible_B1TS(memory: Memory, layer: int, length_B: Tensor, num_queries: int) -> Tensor:
    """Which keys a query sees, True = visible, under the `boundary` rule of Transformer-XL.

    A query sees its own segment up to itself and the last `H_l` tokens before the segment; of these, only those
    of the lane's own piece (`length_B`: how many of its tokens lie before the segment).

    Returns:
        (B, 1, T, S) bool; S counts the ring's slots, the open tokens, then the queries' own tokens.
    """
    device = length_B.device
    ring_BM = memory.ages_M(layer)[None, :] <= length_B[:, None]
    own_length = memory.open_length + num_queries
    own_TS = torch.ones(num_queries, own_length, dtype=torch.bool, device=device)
    own_TS = own_TS.tril(diagonal=memory.open_length)
    return torch.cat(
        [
            ring_BM[:, None, None, :].expand(-1, 1, num_queries, -1),
            own_TS.expand(length_B.shape[0], 1, -1, -1),
        ],
        dim=-1,
    )


def attend(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    memory_key_BHMD: Tensor,
    memory_value_BHMD: Tensor,
    mask_B1TS: Tensor,
) -> Tensor:
    """Softmax attention of the segment's queries over [memory, segment]: concatenation and masked SDPA.

    `softmax(q [k_mem, k]^T / sqrt(D)) [v_mem, v]`, the memory detached: equation 1 of Transformer-XL
    (arXiv 1901.02860) with rotary positions in place of its relative ones. Keys may have fewer heads than
    queries.

    Returns:
        (B, H, T, D)
    """
    return F.scaled_dot_product_attention(
        query_BHTD,
        torch.cat([memory_key_BHMD, key_BHTD], dim=2),
        torch.cat([memory_value_BHMD, value_BHTD], dim=2),
        attn_mask=mask_B1TS,
        enable_gqa=query_BHTD.shape[1] != key_BHTD.shape[1],
    )
