"""FlexAttention over memory and segment, merged by log-sum-exp: the form for CUDA, compiled.

Shapes: B lanes, T queries, H query heads, K key/value heads, D head width, M remembered slots; I and J are blocks of
queries and of keys.

One kernel per number of slots; which of them count comes in with a BlockMask (arXiv 2412.05496), so that neither the
length of the past nor a piece's beginning changes a shape. Blocks of slots that no query sees are never read.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from dsmr.attention.visibility import Past, View

KERNELS = 256  # a schedule may have as many horizons as layers, each has kernels of its own, with and without backward
BLOCK = 128  # queries or keys; FlexAttention's own
FAR = 2**60  # further than any token


def flex(
    query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, past: Past, view: View, gate_H: Tensor | None = None
) -> Tensor:
    """See `dsmr.attention.attend.attend`."""
    if view.num_open:
        past, (open_key, open_value) = past.split(len(view.ages_M))
        key_BKTD, value_BKTD = torch.cat([open_key, key_BKTD], dim=2), torch.cat([open_value, value_BKTD], dim=2)
    grouped = query_BHTD.shape[1] != key_BKTD.shape[1]
    memory_blocks, own_blocks = view.make("flex", blocks)
    if memory_blocks is None or own_blocks is None:
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


def blocks(view: View) -> tuple[BlockMask | None, BlockMask | None]:
    """What is read of the memory and of the segment; nothing where a layer keeps nothing: plain SDPA does that."""
    if not len(view.ages_M):
        return None, None
    return memory_blocks(view), own_blocks(view.num_open, view.num_queries, view.window, view.length_B.device)


def memory_blocks(view: View) -> BlockMask:
    """What `create_block_mask` gives, which looks at every slot, from the youngest and the oldest slot of each block.

    It changes with every segment, so that the time it takes is a training step's.
    """
    ages_M, length_B, place_T, window = view.ages_M, view.length_B, view.place_T, view.window

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ages_M[k] <= length_B[b]

    def sees_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (ages_M[k] <= length_B[b]) & (ages_M[k] + place_T[q] < window)

    (youngest_J, oldest_J), (first_I, last_I) = extremes(ages_M), extremes(place_T)
    length_BI1 = length_B[:, None, None].expand(-1, len(first_I), 1)
    seen_BIJ, whole_BIJ = youngest_J <= length_BI1, oldest_J <= length_BI1
    if window:
        seen_BIJ = seen_BIJ & (youngest_J + first_I[:, None] < window)
        whole_BIJ = whole_BIJ & (oldest_J + last_I[:, None] < window)
    elif len(place_T) % BLOCK:  # blocks that queries do not fill count as partly seen
        whole_BIJ = whole_BIJ & (last_I[:, None] < FAR)
    parts_2B1IJ = torch.stack([seen_BIJ & ~whole_BIJ, whole_BIJ])[:, :, None].to(torch.int32)
    counts_2B1I, indices_2B1IJ = in_order(parts_2B1IJ)
    counts_2B1J, indices_2B1JI = in_order(parts_2B1IJ.mT)
    return BlockMask(
        seq_lengths=(len(place_T), len(ages_M)),
        kv_num_blocks=counts_2B1I[0],
        kv_indices=indices_2B1IJ[0],
        full_kv_num_blocks=counts_2B1I[1],
        full_kv_indices=indices_2B1IJ[1],
        q_num_blocks=counts_2B1J[0],
        q_indices=indices_2B1JI[0],
        full_q_num_blocks=counts_2B1J[1],
        full_q_indices=indices_2B1JI[1],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sees_window if window else sees,
    )


def extremes(number_N: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest number of each block; what is missing in the last one counts as far away."""
    missing = -len(number_N) % BLOCK
    blocks_JN = (F.pad(number_N, (0, missing), value=FAR) if missing else number_N).view(-1, BLOCK)
    least, greatest = blocks_JN.aminmax(dim=1)
    return least, greatest


def in_order(is_read: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are read, and which, these first and in order."""
    order = is_read.argsort(dim=-1, descending=True, stable=True)
    return is_read.sum(dim=-1, dtype=torch.int32).contiguous(), order.to(torch.int32).contiguous()


@lru_cache(maxsize=64)
def own_blocks(num_open: int, num_queries: int, window: int, device: torch.device) -> BlockMask:
    """Of the segment, which is the same in every step."""
    with torch.inference_mode(False):  # training reads it too
        place_T = torch.arange(num_open, num_open + num_queries, device=device)

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return k <= place_T[q]

        def sees_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= place_T[q]) & (k > place_T[q] - window)

        return create_block_mask(
            sees_window if window else sees,
            B=None,
            H=None,
            Q_LEN=num_queries,
            KV_LEN=num_open + num_queries,
            device=device,
        )
