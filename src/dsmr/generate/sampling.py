"""Sample the next token from logits. B lanes, V vocabulary, K kinds of tokens."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmr import UserError

MAX_EXPONENT = 30.0
"""Largest log ratio of a forbidden token, or a kind, to the likeliest allowed token; its exp is finite in float32."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling, applied in this order.

    Attributes:
        temperature: Divide logits by this: below 1 is more predictable, above 1 more varied.
        top_k: Sample only from the k likeliest tokens (0: all).
        top_p: Sample only from the likeliest tokens with this total probability (nucleus, arXiv 1904.09751).
        min_p: Sample only from tokens at least this fraction as likely as the likeliest one (arXiv 2407.01082).
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


def sample_tokens(
    logits_BV: Tensor, allowed_BV: Tensor, uniform_B1: Tensor, sampling: Sampling, kinds_VK: Tensor | None = None
) -> Tensor:
    """Sample one of the allowed tokens per lane, (B,), int64; at least one must be allowed.

    Uniform numbers in [0, 1) are inverted through the cumulative distribution. `kinds_VK` is 1 where a token is of a
    kind, see `normalize_within_kinds`; None renormalises over all allowed tokens.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature != 1:
        logits_BV = logits_BV / sampling.temperature
    if kinds_VK is None:
        probabilities_BV = torch.where(allowed_BV, logits_BV, -torch.inf).softmax(dim=-1)
    else:
        probabilities_BV = normalize_within_kinds(logits_BV, allowed_BV, kinds_VK)
    ordered_BV, order_BV = probabilities_BV.sort(descending=True, dim=-1)
    cumulative_BV = ordered_BV.cumsum(dim=-1)
    last_B1 = _last_kept_rank(ordered_BV, cumulative_BV, sampling)
    mass_B1 = cumulative_BV.gather(1, last_B1)
    # uniform * mass may round up to the mass itself, and the search would then return a token that was cut off or has
    # probability 0. The factor keeps the target strictly below the mass; float32 resolves 2**-24.
    target_B1 = torch.mul(mass_B1, uniform_B1.to(mass_B1.dtype)).mul_(1 - 2**-20)
    rank_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    return order_BV.gather(1, rank_B1).squeeze(1)


def normalize_within_kinds(logits_BV: Tensor, allowed_BV: Tensor, kinds_VK: Tensor) -> Tensor:
    """Probabilities of the allowed tokens, (B, V), where each kind keeps its total probability.

    The probability of a forbidden token goes to the allowed tokens of its own kind: a network that expects a note to
    end, but is wrong about the pitch, still ends a note. Renormalising over all allowed tokens instead would favour
    note-ons, of which most are always allowed, over note-offs, and notes would hardly ever end. A kind without any
    allowed token loses its share to the others.
    """
    allowed_logits_BV = torch.where(allowed_BV, logits_BV, -torch.inf)
    greatest_B1 = allowed_logits_BV.amax(dim=-1, keepdim=True)
    # Relative to the likeliest *allowed* token: relative to the likeliest of all, the weights of all allowed tokens
    # may underflow to 0. Forbidden tokens may then exceed 1, hence the clamp against overflow.
    weight_BV = (logits_BV - greatest_B1).clamp_(max=MAX_EXPONENT).exp_()
    allowed_weight_BV = weight_BV * allowed_BV
    # Per kind: all of its weight / its allowed weight. `tiny` avoids 0 / 0 for kinds without an allowed token, whose
    # ratio is then multiplied by an allowed weight of 0; the clamp keeps inf * 0 = NaN out.
    share_BK = (weight_BV @ kinds_VK) / (allowed_weight_BV @ kinds_VK).clamp_(min=torch.finfo(weight_BV.dtype).tiny)
    share_BK = share_BK.clamp_(max=math.exp(MAX_EXPONENT))
    scaled_BV = allowed_weight_BV * (share_BK @ kinds_VK.T)
    return scaled_BV / scaled_BV.sum(dim=-1, keepdim=True)


def _last_kept_rank(ordered_BV: Tensor, cumulative_BV: Tensor, sampling: Sampling) -> Tensor:
    """Rank of the last token that is kept, (B, 1): top-k, top-p and min-p each keep a prefix of the sorted tokens."""
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
