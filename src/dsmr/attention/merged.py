"""Attention to memory and segment apart, merged by log-sum-exp: the fastest implementation on the CPU.

Shapes: B lanes, T queries, H query heads, K key/value heads, G = H / K, D head width, M slots, R = B * K rows.

The two parts never see each other's keys, so that nothing is concatenated and the ring is read in place. With
`lse = log sum_s exp(q k_s / sqrt(D))` of each part, the softmax over both is (FlashAttention, arXiv 2205.14135)

    out = (1 - share) * own + share * remembered,    share = sigmoid(memory_lse - own_lse)
    lse = log(exp(own_lse) + exp(memory_lse))

Backward of one part with the *joint* out and lse computes exactly that part's share of the gradient, since
`exp(q k - lse)` are the joint softmax's weights. The memory is detached: its backward needs only the gradient of the
queries, three matrix products instead of five.
"""

import itertools
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmr.attention.visibility import Past, Visibility

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
CAUSAL_BLOCK = 128  # queries at a time
BUFFER_BYTES = 2 * 2**20  # of scores at a time: fits the second-level caches of two cores
LOG2_E = math.log2(math.e)  # exp2 takes half the time of exp, so scores are scaled by log2(e)
_uncompiled: Any = None


def merged(
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    past: Past,
    visibility: Visibility,
    gate_H: Tensor | None = None,
) -> Tensor:
    """Attend to segment and memory apart, and merge both; see `dsmr.attention.attend` for the arguments."""
    global _uncompiled
    if "torch._dynamo" not in sys.modules:  # importing it for `disable` alone would take a second
        return _merge(query_BHTD, key_BKTD, value_BKTD, past, visibility, gate_H)
    if _uncompiled is None:
        _uncompiled = torch.compiler.disable(_merge)
    out: Tensor = _uncompiled(query_BHTD, key_BKTD, value_BKTD, past, visibility, gate_H)
    return out


def _merge(
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    past: Past,
    visibility: Visibility,
    gate_H: Tensor | None,
) -> Tensor:
    groups = query_BHTD.shape[1] // key_BKTD.shape[1]
    if visibility.num_open:
        past, (open_key, open_value) = past.split(len(visibility.ages_M))
        key_BKTD, value_BKTD = torch.cat([open_key, key_BKTD], dim=2), torch.cat([open_value, value_BKTD], dim=2)
    if groups > 1:
        key_BKTD, value_BKTD = (part.repeat_interleave(groups, dim=1) for part in (key_BKTD, value_BKTD))
    dtype = query_BHTD.dtype
    biases = visibility.derive(f"merged {groups} {dtype}", lambda visibility: Biases.of(visibility, groups, dtype))
    out: Tensor = _Merged.apply(query_BHTD, key_BKTD, value_BKTD, past.key, past.value, gate_H, biases)
    return out


@dataclass(frozen=True)
class Biases:
    """A visibility as additive masks of 0 and -inf.

    Attributes:
        own_bias: (1, 1, T, N + T), or None if the segment is causal and nothing else.
        memory_bias: (B, 1, 1 or G * T, M), or None if all is visible.
        blind: True = the query sees no slot, (B, 1, 1 or G * T, 1); None if all is visible.
        is_empty: no query sees any slot.
    """

    own_bias: Tensor | None
    memory_bias: Tensor | None
    blind: Tensor | None
    is_empty: bool

    @classmethod
    def of(cls, visibility: Visibility, groups: int, dtype: torch.dtype) -> "Biases":
        """Derive the masks for `groups` query heads that share keys."""
        blind = visibility.blind_mask
        memory_bias, blind = (_per_group(rows, groups) for rows in (_bias(visibility.memory_mask, dtype), blind))
        is_empty = not len(visibility.ages_M) or (blind is not None and bool(blind.all()))
        return cls(_bias(visibility.own_mask, dtype), memory_bias, blind, is_empty)


class _Merged(torch.autograd.Function):
    """Both parts, with gradients of the queries and the segment, and of the memory only if it needs them."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        memory_key: Tensor,
        memory_value: Tensor,
        gate: Tensor | None,
        biases: Biases,
    ) -> Tensor:
        own_bias, memory_bias, blind = biases.own_bias, biases.memory_bias, biases.blind
        own, own_lse = _flash(query, key, value, 0.0, own_bias is None, attn_mask=own_bias)
        ctx.is_empty = biases.is_empty
        if biases.is_empty:
            ctx.save_for_backward(query, key, value, None, None, own_bias, None, own, own_lse, gate, None, None)
            return own
        folded = _fold(query, memory_key)
        remembered, memory_lse = _flash(folded, memory_key, memory_value, 0.0, False, attn_mask=memory_bias)
        if blind is not None:
            # torch's CPU kernel returns lse = 0, not -inf, for a query that sees nothing: its share has to be 0
            remembered = remembered.masked_fill(blind, 0.0)
            memory_lse = memory_lse.masked_fill(blind[..., 0], -torch.inf)
        remembered, memory_lse = remembered.reshape(own.shape), memory_lse.reshape(own_lse.shape)
        if gate is not None:
            memory_lse = memory_lse + gate.to(memory_lse.dtype)[:, None]
        share = (memory_lse - own_lse).sigmoid_().unsqueeze(-1)
        lse = torch.logaddexp(own_lse, memory_lse)
        out = own.to(share.dtype).lerp(remembered.to(share.dtype), share).to(own.dtype)
        parts = (None, None) if gate is None else (remembered, share)
        kept = (query, key, value, memory_key, memory_value, own_bias, memory_bias, out, lse)
        ctx.save_for_backward(*kept, gate, *parts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, memory_key, memory_value, own_bias, memory_bias, out, lse, gate, *parts = ctx.saved_tensors
        # out and lse are those of both parts together: exp(q k - lse) is then the joint softmax, and the backward of
        # the segment alone computes its share of the gradient
        if own_bias is None and query.dtype == lse.dtype:
            grad_query, grad_key, grad_value = _causal_gradients(grad_out, query, key, value, out, lse)
        else:
            grad_query, grad_key, grad_value = _flash_backward(
                grad_out, query, key, value, out, lse, 0.0, own_bias is None, attn_mask=own_bias
            )
        if ctx.is_empty:
            grad_gate = None if gate is None else torch.zeros_like(gate)
            return grad_query, grad_key, grad_value, None, None, grad_gate, None
        grad_gate = None
        if gate is not None:
            remembered, share = parts
            # a score's gradient is P (grad_out v - grad_out out); the gate is in every score of the memory, so that
            # its gradient is their sum over the slots, in which sum_s P v_s = share * remembered
            moved = share * (grad_out * (remembered - out)).sum(dim=-1, keepdim=True, dtype=share.dtype)
            grad_gate = moved.sum(dim=(0, 2, 3)).to(gate.dtype)
            # exp(q k + gate - lse) = exp(q k - (lse - gate)): below, scores are computed without the gate
            lse = lse - gate.to(lse.dtype)[:, None]
        query, grad_out, out = (_fold(part, memory_key) for part in (query, grad_out, out))
        lse = lse.reshape(out.shape[:-1])
        if ctx.needs_input_grad[3]:
            from_memory, grad_memory_key, grad_memory_value = _flash_backward(
                grad_out, query, memory_key, memory_value, out, lse, 0.0, False, attn_mask=memory_bias
            )
            grad_query = grad_query + from_memory.reshape(grad_query.shape)
            return grad_query, grad_key, grad_value, grad_memory_key, grad_memory_value, grad_gate, None
        from_memory = _query_gradient(grad_out, query, memory_key, memory_value, out, lse, memory_bias)
        grad_query += from_memory.view(grad_query.shape)
        return grad_query, grad_key, grad_value, None, None, grad_gate, None


def _causal_gradients(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a causal segment, faster than torch's own backward: blocks above the diagonal are skipped.

    With P = exp(q k - lse) and delta = grad_out . out, FlashAttention's backward is `grad_v = P^T grad_out`,
    `grad_s = P (grad_out v^T - delta)`, `grad_q = grad_s k / sqrt(D)`, `grad_k = grad_s^T q / sqrt(D)`.
    """
    scale, shape = query.shape[-1] ** -0.5, query.shape
    query_RTD, grad_RTD, out_RTD, key_RTD, value_RTD = (
        part.flatten(0, 1) for part in (query * (scale * LOG2_E), grad_out, out, key, value)
    )
    rows, length, _ = query_RTD.shape
    minus_lse_RT1 = -LOG2_E * lse.reshape(rows, length, 1)
    minus_delta_RT1 = -(grad_RTD * out_RTD).sum(dim=-1, keepdim=True)
    grad_query, grad_key, grad_value = (part.new_zeros(part.shape) for part in (query_RTD, key_RTD, value_RTD))
    block = min(CAUSAL_BLOCK, length)
    num_rows = _rows_at_a_time(rows, block * length * query.element_size())
    buffers = query.new_empty(2, num_rows * block * length)
    for row, first in itertools.product(range(0, rows, num_rows), range(0, length, block)):
        end, row_end = min(first + block, length), min(row + num_rows, rows)
        here, past = (slice(row, row_end), slice(first, end)), (slice(row, row_end), slice(end))
        size = (row_end - row, end - first, end)
        weights, grads = (buffer[: math.prod(size)].view(size) for buffer in buffers)
        torch.baddbmm(minus_lse_RT1[here], query_RTD[here], key_RTD[past].mT, out=weights).exp2_()  # P
        weights[:, :, first:].tril_()  # only the block on the diagonal is masked
        torch.baddbmm(minus_delta_RT1[here], grad_RTD[here], value_RTD[past].mT, out=grads)  # grad_out v^T - delta
        grad_value[past] += weights.mT @ grad_RTD[here]
        grads.mul_(weights)  # grad_s
        torch.bmm(grads, key_RTD[past], out=grad_query[here])
        grad_key[past] += grads.mT @ query_RTD[here]  # the queries carry scale * log2(e): divided out below
    return grad_query.mul_(scale).view(shape), grad_key.div_(LOG2_E).view(key.shape), grad_value.view(value.shape)


def _query_gradient(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None
) -> Tensor:
    """Gradient of the queries alone: `sum_s P (grad_out v_s - grad_out out) k_s / sqrt(D)`, P = exp(q k_s - lse).

    Three products instead of five, since a detached memory needs no gradient. Scores are recomputed, a few heads and
    keys at a time, in buffers that fit the caches.
    """
    scale, num_keys, dtype = query.shape[-1] ** -0.5, key.shape[2], lse.dtype
    rows, num_queries = query.shape[0] * query.shape[1], query.shape[2]
    query_RTD, grad_RTD, out_RTD = (part.flatten(0, 1).to(dtype) for part in (query, grad_out, out))
    key_RMD, value_RMD = key.flatten(0, 1), value.flatten(0, 1)
    minus_lse_RT1 = -LOG2_E * lse.reshape(rows, num_queries, 1)
    minus_delta_RT1 = -(grad_RTD * out_RTD).sum(dim=-1, keepdim=True)
    if bias is not None:
        bias = bias.expand(*query.shape[:2], -1, -1).flatten(0, 1)
    query_RTD = query_RTD * (scale * LOG2_E)
    grad_query_RTD = torch.zeros_like(query_RTD)
    num_rows = _rows_at_a_time(rows, num_queries * num_keys * dtype.itemsize)
    width = max(BUFFER_BYTES // (num_rows * num_queries * dtype.itemsize) // 128, 1) * 128
    buffers = torch.empty(2, num_rows * num_queries * min(width, num_keys), dtype=dtype)
    for row in range(0, rows, num_rows):
        part = slice(row, min(row + num_rows, rows))
        for first in range(0, num_keys, width):
            keys = key_RMD[part, first : first + width].to(dtype)
            values = value_RMD[part, first : first + width].to(dtype)
            shape = (len(keys), num_queries, keys.shape[1])
            weights, grads = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
            torch.baddbmm(minus_lse_RT1[part], query_RTD[part], keys.mT, out=weights)  # log2(P)
            if bias is not None:
                weights += bias[part, :, first : first + width]
            torch.baddbmm(minus_delta_RT1[part], grad_RTD[part], values.mT, out=grads)  # grad_out v^T - delta
            grad_query_RTD[part].baddbmm_(weights.exp2_().mul_(grads), keys, alpha=scale)
    return grad_query_RTD.to(query.dtype)


def _rows_at_a_time(rows: int, row_bytes: int) -> int:
    """Rows that fit the buffer, but at least eight, so that all cores have work."""
    return min(rows, max(8, BUFFER_BYTES // row_bytes))


def _fold(part_BHTD: Tensor, like_BKMD: Tensor) -> Tensor:
    """Concatenate the queries of all heads that share keys: (B, K, G * T, D)."""
    heads = like_BKMD.shape[1]
    return (
        part_BHTD if part_BHTD.shape[1] == heads else part_BHTD.reshape(len(part_BHTD), heads, -1, part_BHTD.shape[3])
    )


def _per_group(rows: Tensor | None, groups: int) -> Tensor | None:
    """Repeat a mask of T queries for the G * T queries that share keys."""
    return rows if rows is None or rows.shape[2] == 1 else rows.repeat(1, 1, groups, 1)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 where visible, -inf elsewhere, in the four dimensions that torch's kernel takes."""
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
    return bias if bias.dim() == 4 else bias[None, None]
