"""Plain attention over memory and segment: the reference that every faster implementation must equal.

Shapes: B lanes, T queries, H query heads, K key/value heads, G = H / K, D head width, M slots, N open tokens,
S = M + N + T keys, R = B * K. See `dsmr.attention.attend` for the arguments.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dsmr.attention.visibility import Past, Visibility


def reference(
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    past: Past,
    visibility: Visibility,
    gate_H: Tensor | None = None,
) -> Tensor:
    """Concatenate memory and segment, and call masked scaled-dot-product attention."""
    return F.scaled_dot_product_attention(
        query_BHTD,
        torch.cat([past.key, key_BKTD], dim=2),
        torch.cat([past.value, value_BKTD], dim=2),
        attn_mask=visibility.mask_B1TS if gate_H is None else gated_mask(visibility, gate_H, query_BHTD.dtype),
        enable_gqa=query_BHTD.shape[1] != key_BKTD.shape[1],
    )


def materialised(
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    past: Past,
    visibility: Visibility,
    gate_H: Tensor | None = None,
) -> Tensor:
    """Keep the score matrix for backward, as implementations before fused kernels do."""
    groups = query_BHTD.shape[1] // key_BKTD.shape[1]
    key_BHSD = torch.cat([past.key, key_BKTD], dim=2).repeat_interleave(groups, dim=1)
    value_BHSD = torch.cat([past.value, value_BKTD], dim=2).repeat_interleave(groups, dim=1)
    scores_BHTS = query_BHTD @ key_BHSD.mT * query_BHTD.shape[-1] ** -0.5
    if gate_H is None:
        scores_BHTS = scores_BHTS.masked_fill(~visibility.mask_B1TS, -torch.inf)
    else:
        scores_BHTS = scores_BHTS + gated_mask(visibility, gate_H, scores_BHTS.dtype)
    weights_BHTS = scores_BHTS.softmax(dim=-1, dtype=torch.promote_types(scores_BHTS.dtype, torch.float32))
    return weights_BHTS.to(query_BHTD.dtype) @ value_BHSD


def gated_mask(visibility: Visibility, gate_H: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, H, T, S): the gate on visible slots, 0 on visible tokens of the segment, -inf elsewhere."""
    mask_B1TS, num_slots = visibility.mask_B1TS, len(visibility.ages_M)
    bias_HS = F.pad(gate_H.to(dtype)[:, None].expand(-1, num_slots), (0, mask_B1TS.shape[-1] - num_slots))
    return torch.where(mask_B1TS, bias_HS[None, :, None], -torch.inf)


def single_query(
    query_BH1D: Tensor,
    key_BK1D: Tensor,
    value_BK1D: Tensor,
    past: Past,
    visibility: Visibility,
    gate_H: Tensor | None = None,
) -> Tensor:
    """Attend with one query per lane, reading every key and value in place: decoding without autograd."""
    lanes, heads, _, width = query_BH1D.shape
    num_slots, num_past, kv_heads = len(visibility.ages_M), past.key.shape[2], key_BK1D.shape[1]
    query_RGD = query_BH1D.reshape(lanes * kv_heads, -1, width) * width**-0.5
    own_RG1 = torch.bmm(query_RGD, key_BK1D.flatten(0, 1).mT)
    scores_RGS = torch.cat([torch.bmm(query_RGD, past.key.flatten(0, 1).mT), own_RG1], dim=-1)
    if gate_H is not None:
        gate_BKG1 = gate_H.to(scores_RGS.dtype).view(1, kv_heads, -1, 1)
        scores_RGS.view(lanes, kv_heads, -1, num_past + 1)[..., :num_slots] += gate_BKG1
    if visibility.memory_mask is not None:
        scores_RGM = scores_RGS.view(lanes, kv_heads, -1, num_past + 1)[..., :num_slots]
        scores_RGM.masked_fill_(~visibility.memory_mask, -torch.inf)
    (num_hidden,) = visibility.num_hidden
    if num_hidden:
        scores_RGS[..., num_slots : num_slots + num_hidden] = -torch.inf
    weights_RGS = scores_RGS.softmax(dim=-1, dtype=torch.promote_types(scores_RGS.dtype, torch.float32))
    weights_RGS = weights_RGS.to(value_BK1D.dtype)
    out_RGD = torch.bmm(weights_RGS[..., :num_past], past.value.flatten(0, 1))
    out_RGD.addcmul_(weights_RGS[..., num_past:], value_BK1D.flatten(0, 1))
    return out_RGD.view(lanes, heads, 1, width)
