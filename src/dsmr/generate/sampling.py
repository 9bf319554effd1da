"""How the next token is drawn. B lanes, V vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Which of the tokens that may follow are drawn, and how likely; applied in this order.

    Attributes:
        temperature: divides the logits: below 1 likelier, above 1 wilder.
        top_k: draw only from so many of the likeliest tokens; 0 means all.
        top_p: only from the likeliest tokens that together have this probability (nucleus, arXiv 1904.09751).
        min_p: only from tokens with at least this share of the likeliest one's probability (arXiv 2407.01082).

    Raises:
        ValueError: a setting with which nothing could be drawn.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.98
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be above 0 (top_k 1 takes the likeliest)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (1: all tokens)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be at least 0 (all tokens) and at most 1")


def draw(logits_BV: Tensor, allowed_BV: Tensor, uniform_B1: Tensor, sampling: Sampling) -> Tensor:
    """One token per lane, (B,), int64.

    Args:
        logits_BV: of the network.
        allowed_BV: bool, at least one token in each lane.
        uniform_B1: where in the distribution function to draw, in [0, 1).
        sampling: how.
    """
    logits_BV = logits_BV.float() / sampling.temperature
    probabilities_BV = logits_BV.masked_fill_(~allowed_BV, -torch.inf).softmax(dim=-1)
    ordered_BV, order_BV = probabilities_BV.sort(descending=True, dim=-1)
    if sampling.top_k:
        ordered_BV, order_BV = ordered_BV[:, : sampling.top_k], order_BV[:, : sampling.top_k]
    cumulative_BV = ordered_BV.cumsum(dim=-1)
    kept_BV = ordered_BV >= ordered_BV[:, :1] * max(sampling.min_p, torch.finfo(ordered_BV.dtype).tiny)
    if sampling.top_p < 1:
        kept_BV &= cumulative_BV - ordered_BV < sampling.top_p * cumulative_BV[:, -1:]
    last_B1 = kept_BV.sum(dim=-1, keepdim=True) - 1  # what is kept comes first
    mass_B1 = cumulative_BV.gather(1, last_B1)
    place_B1 = torch.searchsorted(cumulative_BV, uniform_B1.to(mass_B1.dtype) * mass_B1, right=True)
    return order_BV.gather(1, torch.minimum(place_B1, last_B1))[:, 0]
