"""Elementwise parts of a layer on the CPU, in fewer passes over memory and with less kept for backward.

Shapes: B lanes, T segment, H query heads, K key/value heads, D head width, E model width, F features, R rows.

Where they do not pay, `dsmr.model.blocks` computes the same with torch's own operations.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW_ROWS, PARTS = 8, 4  # rows up to which the product is split, and parts that the weight is split into


def trains_on_cpu(x: Tensor) -> bool:
    """True in eager CPU training: autograd records x, and the layer is not being compiled."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() and x.requires_grad and x.device.type == "cpu"


def split_and_rotate(
    heads_BTF: Tensor, cos_TD: Tensor, sin_TD: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, each contiguous: (B, H, T, D), (B, K, T, D), (B, K, T, D)."""
    parts: tuple[Tensor, Tensor, Tensor] = _SplitAndRotate.apply(heads_BTF, cos_TD, sin_TD, num_heads, num_kv_heads)
    return parts


def gated_product(gate_up_BTF: Tensor) -> Tensor:
    """`silu(gate) * up` of the two halves of F; only the input is kept for backward."""
    product: Tensor = _Gated.apply(gate_up_BTF)
    return product


def linear_few_rows(x_RE: Tensor, weight_FE: Tensor) -> Tensor:
    """`x @ weight.T` for a few tokens, (R, F), without autograd.

    A product of few rows runs on one core; a batch of products, each with a part of the weight, runs on all.
    """
    rows, (features, width) = x_RE.shape[0], weight_FE.shape
    if features % PARTS or rows > FEW_ROWS:
        return F.linear(x_RE, weight_FE)
    parts = weight_FE.view(PARTS, features // PARTS, width)
    out = torch.bmm(parts, x_RE.t().expand(PARTS, -1, -1))
    # the next product takes three times as long if its rows are not contiguous
    return out.view(1, features) if rows == 1 else out.view(features, rows).t().contiguous()


def rms_norm(x_RE: Tensor, weight_E: Tensor) -> Tensor:
    """`RMSNorm` in few operations, without autograd."""
    norm_R1 = torch.linalg.vector_norm(x_RE, dim=-1, keepdim=True)
    eps = _constant(torch.finfo(x_RE.dtype).eps, x_RE.dtype)
    scale_R1 = torch.addcmul(eps, norm_R1, norm_R1, value=1 / x_RE.shape[-1]).rsqrt_()
    return (x_RE * scale_R1).mul_(weight_E)


@lru_cache
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


class RMSNorm(nn.RMSNorm):
    """Root mean square normalisation (arXiv 1910.07467); CPU training keeps the input and one number per token."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        if not trains_on_cpu(x) or x.dtype != self.weight.dtype:
            return super().forward(x)
        normal: Tensor = _RMSNorm.apply(x, self.weight, torch.finfo(x.dtype).eps)
        return normal


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normal = x * inverse
        weighted = grad * normal
        grad_weight = weighted.flatten(0, -2).sum(dim=0)
        mean = (weighted @ weight).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = torch.addcmul(grad * weight, normal, mean, value=-1).mul_(inverse)
        return grad_x, grad_weight, None


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, heads_BTF: Tensor, cos_TD: Tensor, sin_TD: Tensor, num_heads: int, num_kv_heads: int
    ) -> tuple[Tensor, ...]:
        lanes, length, _ = heads_BTF.shape
        ctx.save_for_backward(cos_TD, sin_TD)
        ctx.counts = [num_heads, num_kv_heads, num_kv_heads]
        parts = heads_BTF.view(lanes, length, sum(ctx.counts), -1).transpose(1, 2).split(ctx.counts, dim=1)
        query, key, value = (part.new_empty(part.shape) for part in parts)
        _rotate(parts[0], cos_TD, sin_TD, query)
        _rotate(parts[1], cos_TD, sin_TD, key)
        return query, key, value.copy_(parts[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_TD, sin_TD = ctx.saved_tensors
        lanes, _, length, width = grads[0].shape
        grad_BTF = grads[0].new_empty(lanes, length, sum(ctx.counts) * width)
        parts = grad_BTF.view(lanes, length, -1, width).transpose(1, 2).split(ctx.counts, dim=1)
        _rotate(grads[0], cos_TD, -sin_TD, parts[0])
        _rotate(grads[1], cos_TD, -sin_TD, parts[1])
        parts[2].copy_(grads[2])
        return grad_BTF, None, None, None, None


def _rotate(source: Tensor, cos_TD: Tensor, sin_TD: Tensor, target: Tensor) -> None:
    half = source.shape[-1] // 2
    torch.mul(source, cos_TD, out=target)
    target[..., :half].addcmul_(source[..., half:], sin_TD[:, :half])
    target[..., half:].addcmul_(source[..., :half], sin_TD[:, half:])


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_BTF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_BTF)
        gate, up = gate_up_BTF.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up_BTF,) = ctx.saved_tensors
        gate, up = gate_up_BTF.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up_BTF)
        to_gate, to_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=to_up)
        torch.ops.aten.silu_backward.grad_input(up * grad, gate, grad_input=to_gate)
        return grad_gate_up
