"""How the next token is drawn. B lanes, V vocabulary."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmr import UserError

EXPONENT = 30.0  # e to it: the most that a forbidden token, or a kind, weighs against the likeliest allowed token


@dataclass(frozen=True)
class Sampling:
    """Which of the tokens that may follow are drawn, and how likely; applied in this order.

    Attributes:
        temperature: divides the logits: below 1 likelier, above 1 wilder.
        top_k: draw only from so many of the likeliest tokens; 0 means all.
        top_p: only from the likeliest tokens that together have this probability (nucleus, arXiv 1904.09751).
        min_p: only from tokens with at least this share of the likeliest one's probability (arXiv 2407.01082).

    Raises:
        UserError: a setting with which nothing could be drawn.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.98
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be above 0 (top_k 1 takes the likeliest)")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (1: all tokens)")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; it must be at least 0 (all tokens) and at most 1")


def draw(
    logits_BV: Tensor, allowed_BV: Tensor, uniform_B1: Tensor, sampling: Sampling, kinds_VK: Tensor | None = None
) -> Tensor:
    """One token per lane, (B,), int64.

    What is not allowed gives its probability to the allowed tokens of its own kind: a network that expects the end of
    some note, and errs in its pitch, still ends one. (Shared out to all tokens, notes begin and hardly end.)

    Args:
        logits_BV: of the network.
        allowed_BV: bool, at least one token in each lane.
        uniform_B1: where in the distribution function to draw, in [0, 1).
        sampling: how.
        kinds_VK: 1 where a token is of a kind; None means that all are of one.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature != 1:
        logits_BV = logits_BV / sampling.temperature
    if kinds_VK is None:
        probabilities_BV = torch.where(allowed_BV, logits_BV, -torch.inf).softmax(dim=-1)
    else:
        probabilities_BV = within_kinds(logits_BV, allowed_BV, kinds_VK)
    ordered_BV, order_BV = probabilities_BV.sort(descending=True, dim=-1)
    cumulative_BV = ordered_BV.cumsum(dim=-1)
    last_B1 = _last(ordered_BV, cumulative_BV, sampling)
    mass_B1 = cumulative_BV.gather(1, last_B1)
    # always below the mass, however it is rounded: what comes after has no probability
    target_B1 = torch.mul(mass_B1, uniform_B1.to(mass_B1.dtype)).mul_(1 - 2**-20)
    place_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    return order_BV.gather(1, place_B1).squeeze(1)


def within_kinds(logits_BV: Tensor, allowed_BV: Tensor, kinds_VK: Tensor) -> Tensor:
    """Probabilities of the allowed tokens, (B, V); each kind keeps its share, if any of it is allowed."""
    allowed_logits_BV = torch.where(allowed_BV, logits_BV, -torch.inf)
    greatest_B1 = allowed_logits_BV.amax(dim=-1, keepdim=True)
    # against the likeliest allowed token: however unlikely that is, its kind's share is a number
    weight_BV = (logits_BV - greatest_B1).clamp_(max=EXPONENT).exp_()
    allowed_weight_BV = weight_BV * allowed_BV
    share_BK = (weight_BV @ kinds_VK) / (allowed_weight_BV @ kinds_VK).clamp_(min=torch.finfo(weight_BV.dtype).tiny)
    share_BK = share_BK.clamp_(max=math.exp(EXPONENT))
    found_BV = allowed_weight_BV * (share_BK @ kinds_VK.T)
    return found_BV / found_BV.sum(dim=-1, keepdim=True)


def _last(ordered_BV: Tensor, cumulative_BV: Tensor, sampling: Sampling) -> Tensor:
    """Rank of the last token that is kept, (B, 1): what is kept comes first."""
    lanes, most = len(ordered_BV), ordered_BV.shape[1] - 1
    if sampling.top_k:
        most = min(most, sampling.top_k - 1)
    if sampling.top_p < 1:
        share_B1 = cumulative_BV[:, -1:] * sampling.top_p
        last_B1 = torch.searchsorted(cumulative_BV, share_B1).clamp_(max=most)
    else:
        last_B1 = torch.full((lanes, 1), most, device=ordered_BV.device)
    if sampling.min_p:
        is_kept_BV = ordered_BV >= ordered_BV[:, :1] * sampling.min_p
        last_B1 = torch.minimum(last_B1, is_kept_BV.sum(dim=-1, keepdim=True) - 1)
    return last_B1
