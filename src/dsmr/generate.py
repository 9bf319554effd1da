"""Sampling music token by token, at constant memory.

B lanes (one here), V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dsmr.model import Backbone


@torch.inference_mode()
def sample_tokens(
    backbone: Backbone,
    prompt: list[int],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    forbidden: tuple[int, ...] = (),
) -> Iterator[int]:
    """Continue a piece without end; the caller stops where it likes.

    The prompt is read in whole segments at training speed, then token by token; the memory never grows.

    Args:
        backbone: in evaluation mode.
        prompt: ids from the piece's beginning, BOS first.
        temperature: divides the logits; above 0.
        top_p: keep the smallest set of tokens with this probability (nucleus sampling, arXiv 1904.09751).
        seed: of the draws.
        forbidden: ids that are never drawn.

    Raises:
        ValueError: an empty prompt, or settings out of range.
    """
    if not prompt:
        raise ValueError("the prompt is empty; it begins with BOS at least")
    if temperature <= 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature ({temperature}) must be above 0, top_p ({top_p}) above 0 and at most 1")
    device = next(backbone.parameters()).device
    draws = torch.Generator(device).manual_seed(seed)
    memory = backbone.init_memory(1, decoding=True)
    read = prompt
    while True:
        for first in range(0, len(read), backbone.segment_length):
            part_BT = torch.tensor([read[first : first + backbone.segment_length]], device=device)
            logits_BTV, update = backbone(part_BT, memory)
            memory.commit(update)
        logits_V = logits_BTV[0, -1].float() / temperature
        logits_V[list(forbidden)] = -torch.inf
        read = [int(torch.multinomial(nucleus(logits_V, top_p), 1, generator=draws))]
        yield read[0]


def nucleus(logits_V: Tensor, top_p: float) -> Tensor:
    """Probabilities of the smallest set of tokens that has at least `top_p` of the mass, (V,)."""
    probabilities_V = logits_V.softmax(dim=-1)
    ordered_V, order_V = probabilities_V.sort(descending=True)
    ordered_V[ordered_V.cumsum(dim=-1) - ordered_V >= top_p] = 0
    return torch.zeros_like(probabilities_V).scatter(0, order_V, ordered_V)
