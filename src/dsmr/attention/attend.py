"""Attention over memory and segment: one function with interchangeable forms, of which the reference is the plainest.

Shapes: B lanes, T queries, H query heads, K key/value heads, G = H / K, D head width, M remembered slots, N open
tokens, S = M + N + T keys, R = B * K. Every form has to equal the reference, forward and backward.
"""

import logging
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dsmr.attention.flex import blocks, flex
from dsmr.attention.merged import merged
from dsmr.attention.visibility import Past, View

Form = Literal["auto", "merged", "flex", "reference", "materialised"]
_log = logging.getLogger(__name__)


Attention = Callable[[Tensor, Tensor, Tensor, Past, View, Tensor | None], Tensor]


def attend(
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    past: Past,
    view: View,
    form: Form = "auto",
    gate_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention of the segment's queries over what is remembered and their own segment.

    `softmax(q [k_memory, k]^T / sqrt(D)) [v_memory, v]`, the memory detached: equation 1 of Transformer-XL
    (arXiv 1901.02860) with rotary positions in place of its relative ones. Keys may have fewer heads than
    queries. A single query always takes the form that reads every key once.

    Args:
        query_BHTD: rotated queries.
        key_BKTD: their own tokens' rotated keys.
        value_BKTD: likewise the values.
        past: what came before.
        view: what of it they see.
        form: `auto` is merged on the CPU, flex on CUDA, else the reference.
        gate_H: added to every score of a remembered slot, by query head; None adds nothing.

    Returns:
        (B, H, T, D)
    """
    if view.num_queries == 1 and form != "reference":
        return single(query_BHTD, key_BKTD, value_BKTD, past, view, gate_H)
    return chosen(form, query_BHTD.device.type)(query_BHTD, key_BKTD, value_BKTD, past, view, gate_H)


def prepare(view: View, form: Form) -> None:
    """Derive from a view what its form needs, before layers see it that may be compiled."""
    if view.num_queries > 1 and chosen(form, view.length_B.device.type) is flex:
        view.make("flex", blocks)
        view.own_mask  # noqa: B018  kept by the view, for layers without memory


def is_compiled(form: Form, device: str) -> bool:
    """True if the implementation is compiled for every shape of queries and keys."""
    return chosen(form, device) is flex


_chosen: dict[tuple[Form, str], Attention] = {}  # no functools.cache: compiled layers look here too


def chosen(form: Form, device: str) -> Attention:
    """The function of a form; where it does not run on a device, the reference, with one line in the log."""
    if (form, device) not in _chosen:
        _chosen[form, device] = _choose(form, device)
    return _chosen[form, device]


def _choose(form: Form, device: str) -> Attention:
    if form == "auto":
        form = {"cpu": "merged", "cuda": "flex"}.get(device, "auto")  # type: ignore[assignment]
    forms: dict[str, Attention] = {"reference": reference, "materialised": materialised}
    if device == "cpu":
        forms["merged"] = merged
    if device == "cuda":
        forms["flex"] = flex
    if form not in forms:
        _log.warning("attention: no %s form on %s; the reference form is used", form.replace("auto", "fast"), device)
    return forms.get(form, reference)


def reference(
    query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, past: Past, view: View, gate_H: Tensor | None = None
) -> Tensor:
    """Concatenation and masked SDPA; see `attend`."""
    return F.scaled_dot_product_attention(
        query_BHTD,
        torch.cat([past.key, key_BKTD], dim=2),
        torch.cat([past.value, value_BKTD], dim=2),
        attn_mask=view.mask_B1TS if gate_H is None else gated_mask(view, gate_H, query_BHTD.dtype),
        enable_gqa=query_BHTD.shape[1] != key_BKTD.shape[1],
    )


def gated_mask(view: View, gate_H: Tensor, dtype: torch.dtype) -> Tensor:
    """The gate where a slot is seen, 0 where a token of the segment is, -inf elsewhere: (B, H, T, S)."""
    mask_B1TS, num_slots = view.mask_B1TS, len(view.ages_M)
    bias_HS = F.pad(gate_H.to(dtype)[:, None].expand(-1, num_slots), (0, mask_B1TS.shape[-1] - num_slots))
    return torch.where(mask_B1TS, bias_HS[None, :, None], -torch.inf)


def materialised(
    query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, past: Past, view: View, gate_H: Tensor | None = None
) -> Tensor:
    """Keep the score matrix for backward, as implementations before fused kernels do; see `attend`."""
    groups = query_BHTD.shape[1] // key_BKTD.shape[1]
    key_BHSD = torch.cat([past.key, key_BKTD], dim=2).repeat_interleave(groups, dim=1)
    value_BHSD = torch.cat([past.value, value_BKTD], dim=2).repeat_interleave(groups, dim=1)
    scores_BHTS = query_BHTD @ key_BHSD.mT * query_BHTD.shape[-1] ** -0.5
    if gate_H is None:
        scores_BHTS = scores_BHTS.masked_fill(~view.mask_B1TS, -torch.inf)
    else:
        scores_BHTS = scores_BHTS + gated_mask(view, gate_H, scores_BHTS.dtype)
    weights_BHTS = scores_BHTS.softmax(dim=-1, dtype=torch.promote_types(scores_BHTS.dtype, torch.float32))
    return weights_BHTS.to(query_BHTD.dtype) @ value_BHSD


def single(
    query_BH1D: Tensor, key_BK1D: Tensor, value_BK1D: Tensor, past: Past, view: View, gate_H: Tensor | None = None
) -> Tensor:
    """One query per lane: every key and value is read once where it lies, nothing of them is copied; see `attend`."""
    lanes, heads, _, width = query_BH1D.shape
    num_slots, num_past, kv_heads = len(view.ages_M), past.key.shape[2], key_BK1D.shape[1]
    query_RGD = query_BH1D.reshape(lanes * kv_heads, -1, width) * width**-0.5
    own_RG1 = torch.bmm(query_RGD, key_BK1D.flatten(0, 1).mT)
    scores_RGS = torch.cat([torch.bmm(query_RGD, past.key.flatten(0, 1).mT), own_RG1], dim=-1)
    if gate_H is not None:
        gate_BKG1 = gate_H.to(scores_RGS.dtype).view(1, kv_heads, -1, 1)
        scores_RGS.view(lanes, kv_heads, -1, num_past + 1)[..., :num_slots] += gate_BKG1
    if view.memory_mask is not None:
        scores_RGM = scores_RGS.view(lanes, kv_heads, -1, num_past + 1)[..., :num_slots]
        scores_RGM.masked_fill_(~view.memory_mask, -torch.inf)
    if view.window and view.window <= view.num_open:
        scores_RGS[..., num_slots : num_past + 1 - view.window] = -torch.inf
    weights_RGS = scores_RGS.softmax(dim=-1, dtype=torch.promote_types(scores_RGS.dtype, torch.float32))
    weights_RGS = weights_RGS.to(value_BK1D.dtype)
    out_RGD = torch.bmm(weights_RGS[..., :num_past], past.value.flatten(0, 1))
    out_RGD.addcmul_(weights_RGS[..., num_past:], value_BK1D.flatten(0, 1))
    return out_RGD.view(lanes, heads, 1, width)
