"""Attention over memory and segment: one function, of which this is the reference form.

Shapes: B lanes, T queries, M memory (ring slots and, while decoding, the open tokens), S = M + T, H heads,
D head width. Every other backend has to equal this one, forward and backward.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dsmr.model.horizons import Rule
from dsmr.model.memory import Memory


def visible_B1TS(memory: Memory, layer: int, length_B: Tensor, num_queries: int, rule: Rule = "boundary") -> Tensor:
    """Which keys a query sees, True = visible; of what is remembered, only tokens of the lane's own piece.

    `boundary`, Transformer-XL's: its own segment up to itself, and the last `H_l` tokens before the segment.
    `sliding`: the `H_l` tokens that end with itself, wherever segments begin; its own segment up to itself in a
    layer with `H_l = 0`.

    Args:
        memory: for its clock and its open segment.
        layer: whose horizon counts.
        length_B: how many tokens of the lane's piece lie before the segment.
        num_queries: T, the queries that follow the open segment.
        rule: one of the two.

    Returns:
        (B, 1, T, S) bool; S counts the ring's slots, the open tokens, then the queries' own tokens.
    """
    device, horizon = length_B.device, memory.horizons[layer]
    ages_M = memory.ages_M(layer)
    ring_B1TM = (ages_M <= length_B[:, None])[:, None, None, :].expand(-1, 1, num_queries, -1)
    own_length = memory.open_length + num_queries
    own_TS = torch.ones(num_queries, own_length, dtype=torch.bool, device=device).tril(memory.open_length)
    if rule == "sliding" and horizon:
        place_T = torch.arange(memory.open_length, own_length, device=device)
        ring_B1TM = ring_B1TM & (ages_M + place_T[:, None] < horizon)
        own_TS = own_TS.triu(memory.open_length - horizon + 1)
    return torch.cat([ring_B1TM, own_TS.expand(len(length_B), 1, -1, -1)], dim=-1)


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
