"""FlexAttention over memory and segment, merged by log-sum-exp: compiled kernels for CUDA.

Shapes: B lanes, T queries, H query heads, K key/value heads, D head width, M slots; I and J count blocks of queries
and of keys.

One kernel per number of slots. Which slots are visible comes in with a BlockMask (arXiv 2412.05496), so that neither
the length of the past nor the beginning of a piece changes a shape; blocks of slots that no query sees are never read.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from dsmr.attention.visibility import FAR, Past, Visibility, on_device

# every horizon of a schedule has kernels of its own, with and without backward
KERNELS = 256
BLOCK = 128  # queries or keys per block, FlexAttention's default


def flex(
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    past: Past,
    visibility: Visibility,
    gate_H: Tensor | None = None,
) -> Tensor:
    """Attend to segment and memory apart, and merge both by log-sum-exp; see `attend`."""
    if visibility.num_open:
        past, (open_key, open_value) = past.split(len(visibility.ages_M))
        key_BKTD, value_BKTD = torch.cat([open_key, key_BKTD], dim=2), torch.cat([open_value, value_BKTD], dim=2)
    grouped = query_BHTD.shape[1] != key_BKTD.shape[1]
    memory_mask, own_mask = visibility.derive("flex", flex_blocks)
    if memory_mask is None or own_mask is None:
        own = F.scaled_dot_product_attention(
            query_BHTD,
            key_BKTD,
            value_BKTD,
            attn_mask=visibility.own_mask,
            is_causal=visibility.own_mask is None,
            enable_gqa=grouped,
        )
        return own if gate_H is None else own + 0 * gate_H.sum().to(own.dtype)  # so that it has a gradient
    # a compiled layer compiles it too; on other devices than CUDA it runs uncompiled, for tests
    alone = query_BHTD.device.type == "cuda" and not torch.compiler.is_compiling()
    kernel: Any = compiled_kernel() if alone else flex_attention
    wanted = AuxRequest(lse=True)
    own, own_aux = kernel(query_BHTD, key_BKTD, value_BKTD, block_mask=own_mask, enable_gqa=grouped, return_aux=wanted)
    remembered, memory_aux = kernel(
        query_BHTD, past.key, past.value, block_mask=memory_mask, enable_gqa=grouped, return_aux=wanted
    )
    memory_lse = memory_aux.lse if gate_H is None else memory_aux.lse + gate_H[:, None]
    # a query that sees no slot has a memory_lse of -inf, and so a share of 0
    share = torch.sigmoid(memory_lse - own_aux.lse).unsqueeze(-1)
    return torch.lerp(own.to(share.dtype), remembered.to(share.dtype), share).to(query_BHTD.dtype)


@cache
def compiled_kernel() -> Callable[..., Any]:
    """Compile FlexAttention for static shapes."""
    allow_kernels()
    return torch.compile(flex_attention, dynamic=False)


def allow_kernels() -> None:
    """Raise torch's limit on how often one function is compiled to what a schedule may need."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KERNELS)


def flex_blocks(visibility: Visibility) -> tuple[BlockMask | None, BlockMask | None]:
    """Return the block masks of memory and segment; None for a layer without memory, which plain SDPA computes."""
    if not len(visibility.ages_M):
        return None, None
    own = own_blocks(visibility.num_hidden, visibility.num_open, visibility.length_B.device)
    return memory_blocks(visibility), own


def memory_blocks(visibility: Visibility) -> BlockMask:
    """Block mask of the memory, equal to what `create_block_mask` would compute.

    That function looks at every pair of query and slot. Here a block of slots is visible if its youngest slot is
    visible to the query that sees furthest, and fully visible if its oldest slot is visible to the query that sees
    least: two comparisons per block. It is computed for every segment, within the training step.
    """
    ages_M, num_queries = visibility.ages_M, visibility.num_queries
    oldest_BT = visibility.oldest_seen.expand(-1, num_queries).contiguous()

    def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ages_M[k] <= oldest_BT[b, q]

    # slots and queries that are missing in the last block count as never visible, as in create_block_mask
    youngest_J, oldest_J = block_extremes(ages_M, missing=FAR)
    least_BI, most_BI = block_extremes(oldest_BT, missing=-FAR)
    visible_BIJ = youngest_J <= most_BI[..., None]
    whole_BIJ = oldest_J <= least_BI[..., None]
    parts_2B1IJ = torch.stack([visible_BIJ & ~whole_BIJ, whole_BIJ])[:, :, None].to(torch.int32)
    counts_2B1I, indices_2B1IJ = read_order(parts_2B1IJ)
    counts_2B1J, indices_2B1JI = read_order(parts_2B1IJ.mT)  # the transpose, which backward reads
    return BlockMask(
        seq_lengths=(num_queries, len(ages_M)),
        kv_num_blocks=counts_2B1I[0],
        kv_indices=indices_2B1IJ[0],
        full_kv_num_blocks=counts_2B1I[1],
        full_kv_indices=indices_2B1IJ[1],
        q_num_blocks=counts_2B1J[0],
        q_indices=indices_2B1JI[0],
        full_q_num_blocks=counts_2B1J[1],
        full_q_indices=indices_2B1JI[1],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=is_visible,
    )


def block_extremes(numbers: Tensor, *, missing: int) -> tuple[Tensor, Tensor]:
    """Least and greatest number of each block along the last dimension; the last block is filled with `missing`."""
    absent = -numbers.shape[-1] % BLOCK
    padded = F.pad(numbers, (0, absent), value=missing) if absent else numbers
    least, greatest = padded.unflatten(-1, (-1, BLOCK)).aminmax(dim=-1)
    return least, greatest


def read_order(is_read: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of each row are read, and the indices of all blocks, those that are read first."""
    order = is_read.argsort(dim=-1, descending=True, stable=True)
    return is_read.sum(dim=-1, dtype=torch.int32).contiguous(), order.to(torch.int32).contiguous()


@lru_cache(maxsize=64)
def own_blocks(num_hidden: tuple[int, ...], num_open: int, device: torch.device) -> BlockMask:
    """Block mask of the segment, which is the same in every step; see `Visibility.num_hidden`."""
    num_queries = len(num_hidden)
    with torch.inference_mode(False):  # training reads the cached mask too
        position_T = torch.arange(num_open, num_open + num_queries, device=device)
        hidden_T = on_device(num_hidden, device)

        def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= position_T[q]) & (k >= hidden_T[q])

        return create_block_mask(
            is_visible, B=None, H=None, Q_LEN=num_queries, KV_LEN=num_open + num_queries, device=device
        )
