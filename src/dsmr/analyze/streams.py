"""Evaluation of whole pieces without a trainer: the scores of `dsmr validate`, in the precision of the weights."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dsmr.batch import IGNORED, Segment
from dsmr.data.sources import Split
from dsmr.model import Backbone
from dsmr.results.piece_table import PieceTable
from dsmr.training.losses import token_nll
from dsmr.training.metrics import PieceNLL
from dsmr.training.scores import build_piece_table


@torch.no_grad()
def score_pieces(
    backbone: Backbone,
    data: Any,
    *,
    split: Split = "validation",
    horizons: Sequence[int] | None = None,
    watch: Callable[[Segment], None] | None = None,
) -> PieceTable:
    """Compute the loss of every piece of a split.

    The network is in evaluation mode, on its device; `data` is the datamodule, whose `validation_stride` selects the
    validation pieces. `horizons` replaces those of the network, with the same weights. `watch` is called with each
    batch before the network reads it.
    """
    device = next(backbone.parameters()).device
    metric = PieceNLL(len(data.store.pieces), len(data.families)).to(device)
    family_V = torch.from_numpy(data.token_families).to(device)
    with nullcontext() if horizons is None else backbone.remembering(horizons):
        memory = backbone.init_memory(data.num_lanes)
        for given in data.test_dataloader() if split == "test" else data.val_dataloader():
            batch = type(given)(*(part.to(device) if isinstance(part, Tensor) else part for part in given))
            if watch is not None:
                watch(batch)
            logits_BTV, update = backbone(batch.tokens_BT, memory, batch.is_start_B)
            memory.commit(update)
            nll_BT = token_nll(logits_BTV, batch.targets_BT)
            family_BT = family_V[batch.targets_BT.clamp(min=0)]
            is_real_BT = batch.targets_BT != IGNORED
            metric.update(nll_BT, is_real_BT, batch.piece_B, batch.position_B, family_BT, batch.microseconds_B)
    return build_piece_table(metric, data)


@torch.no_grad()
def piece_nll(backbone: Backbone, ids_N: Tensor) -> Tensor:
    """Nats of every token of one piece (BOS, events, EOS) but its first, (N - 1,), with memory."""
    length, device = backbone.segment_length, next(backbone.parameters()).device
    memory, found = backbone.init_memory(1), []
    inputs_N, targets_N = ids_N[:-1].to(device), ids_N[1:].to(device)
    for first in range(0, len(inputs_N), length):
        tokens_1T, targets_1T = padded_lane(inputs_N, first, length, 0), padded_lane(targets_N, first, length, IGNORED)
        logits_BTV, update = backbone(tokens_1T, memory, torch.tensor([first == 0], device=device))
        memory.commit(update)
        found.append(token_nll(logits_BTV, targets_1T)[0, : len(inputs_N) - first])
    return torch.cat(found)


@torch.no_grad()
def window_nll(backbone: Backbone, ids_N: Tensor) -> Tensor:
    """Nats of every token of one piece but its first, (N - 1,), without memory.

    The piece is read in windows of a segment that overlap by half, so that every token beyond the first half segment
    has at least half a segment of context. The difference from `piece_nll` is then due to memory, and not to the
    place where a segment begins.
    """
    length, device = backbone.segment_length, next(backbone.parameters()).device
    half = max(length // 2, 1)
    inputs_N, targets_N = ids_N[:-1].to(device), ids_N[1:].to(device)
    dtype = torch.promote_types(next(backbone.parameters()).dtype, torch.float32)
    found_N = torch.zeros(len(inputs_N), dtype=dtype, device=device)
    is_start_1 = torch.ones(1, dtype=torch.bool, device=device)
    with backbone.remembering((0,) * len(backbone.horizons)):
        for first in range(0, max(len(inputs_N) - length, 0) + half, half):
            tokens_1T = padded_lane(inputs_N, first, length, 0)
            targets_1T = padded_lane(targets_N, first, length, IGNORED)
            logits_BTV, _ = backbone(tokens_1T, backbone.init_memory(1), is_start_1)
            nll_T = token_nll(logits_BTV, targets_1T)[0].to(dtype)
            context, end = half if first else 0, min(first + length, len(inputs_N))
            found_N[first + context : end] = nll_T[context : end - first]
    return found_N


def padded_lane(ids_N: Tensor, first: int, length: int, fill: int) -> Tensor:
    """Tokens [first, first + length) as one lane, (1, T), with `fill` beyond the end."""
    part = ids_N[first : first + length]
    return torch.nn.functional.pad(part, (0, length - len(part)), value=fill)[None]
