"""FlexAttention over memory and segment, merged by log-sum-exp: the form for CUDA, compiled.

Shapes: B lanes, T queries, H query heads, K key/value heads, D head width, M remembered slots.

One kernel per number of slots; which of them count comes in with a BlockMask (arXiv 2412.05496), so that neither the
length of the past nor a piece's beginning changes a shape. Blocks of slots that no query sees are never read.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from dsmr.model.view import Past, View

KERNELS = 64  # a schedule may have as many horizons as layers, and each has a kernel of its own


def flex(
    query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, past: Past, view: View, gate_H: Tensor | None = None
) -> Tensor:
    """See `dsmr.model.attention.attend`."""
    if view.num_open:
        past, (open_key, open_value) = past.split(len(view.ages_M))
        key_BKTD, value_BKTD = torch.cat([open_key, key_BKTD], dim=2), torch.cat([open_value, value_BKTD], dim=2)
    grouped = query_BHTD.shape[1] != key_BKTD.shape[1]
    memory_blocks, own_blocks = view.make("flex", blocks)
    if memory_blocks is None:
        own = F.scaled_dot_product_attention(
            query_BHTD,
            key_BKTD,
            value_BKTD,
            attn_mask=view.own_mask,
            is_causal=view.own_mask is None,
            enable_gqa=grouped,
        )
        return own if gate_H is None else own + 0 * gate_H.sum().to(own.dtype)  # so that it has a gradient
    # inside a compiled layer it is compiled with the layer; elsewhere than on CUDA it runs as it is, for tests
    alone = query_BHTD.device.type == "cuda" and not torch.compiler.is_compiling()
    kernel: Any = compiled() if alone else flex_attention
    wanted = AuxRequest(lse=True)
    own, own_aux = kernel(
        query_BHTD, key_BKTD, value_BKTD, block_mask=own_blocks, enable_gqa=grouped, return_aux=wanted
    )
    remembered, memory_aux = kernel(
        query_BHTD, past.key, past.value, block_mask=memory_blocks, enable_gqa=grouped, return_aux=wanted
    )
    memory_lse = memory_aux.lse if gate_H is None else memory_aux.lse + gate_H[:, None]
    share = torch.sigmoid(memory_lse - own_aux.lse).unsqueeze(-1)
    return torch.lerp(own.to(share.dtype), remembered.to(share.dtype), share).to(query_BHTD.dtype)


@cache
def compiled() -> Callable[..., Any]:
    """The kernel, compiled for static shapes."""
    allow_kernels()
    return torch.compile(flex_attention, dynamic=False)


def allow_kernels() -> None:
    """Let torch compile one function for as many shapes as a schedule may have."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KERNELS)


def blocks(view: View) -> tuple[BlockMask | None, BlockMask]:
    """What is read of the memory (None where a layer keeps none) and of the segment."""
    return _memory_blocks(view), _own_blocks(view)


def _memory_blocks(view: View) -> BlockMask | None:
    if not len(view.ages_M):
        return None
    ages_M, length_B, place_T, window = view.ages_M, view.length_B, view.place_T, view.window

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ages_M[k] <= length_B[b]

    def sees_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (ages_M[k] <= length_B[b]) & (ages_M[k] + place_T[q] < window)

    return create_block_mask(
        sees_window if window else sees,
        B=len(length_B),
        H=None,
        Q_LEN=view.num_queries,
        KV_LEN=len(ages_M),
        device=length_B.device,
    )


def _own_blocks(view: View) -> BlockMask:
    place_T, window = view.place_T, view.window

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= place_T[q]

    def sees_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= place_T[q]) & (k > place_T[q] - window)

    return create_block_mask(
        sees_window if window else sees,
        B=None,
        H=None,
        Q_LEN=view.num_queries,
        KV_LEN=view.num_open + view.num_queries,
        device=view.length_B.device,
    )
