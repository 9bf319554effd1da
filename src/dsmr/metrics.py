"""Perplexity and what belongs beside it, as torchmetrics.

Every figure is a ratio of two sums over tokens, kept in float64 and summed over processes: never a mean of batch
means. NLL is in nats. B lanes, T segment, V vocabulary, K distances.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenNLL(Metric):
    """Perplexity, nats per token, per note and per second of music, over all tokens seen.

    Perplexities compare only within one tokenizer; nats per note and per second compare between tokenizers.
    """

    full_state_update = False
    nll: Tensor
    tokens: Tensor
    notes: Tensor
    seconds: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.set_dtype(torch.float64)
        for name in ("nll", "tokens", "notes", "seconds"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll_BT: Tensor, is_real_BT: Tensor, is_note_BT: Tensor, seconds_B: Tensor) -> None:
        """Add a batch.

        Args:
            nll_BT: nats of each target, 0 where it is ignored.
            is_real_BT: bool, targets that count.
            is_note_BT: bool, targets that begin a note.
            seconds_B: music time that the targets cover.
        """
        self.nll += nll_BT.sum(dtype=torch.float64)
        self.tokens += is_real_BT.sum()
        self.notes += (is_note_BT & is_real_BT).sum()
        self.seconds += seconds_B.sum(dtype=torch.float64)

    def compute(self) -> dict[str, Tensor]:
        """`nll`, `perplexity`, `nats_per_note`, `nats_per_second`; NaN where nothing was seen."""
        nll = self.nll / self.tokens
        return {
            "nll": nll,
            "perplexity": nll.exp(),
            "nats_per_note": self.nll / self.notes,
            "nats_per_second": self.nll / self.seconds,
        }


class RecallPerplexity(Metric):
    """Perplexity of the answers of generated pieces, by their distance from the mark in tokens.

    1 is perfect memory, the number of marks (16) is chance.
    """

    full_state_update = False
    nll_K: Tensor
    tokens_K: Tensor

    def __init__(self, distances: Sequence[int]) -> None:
        super().__init__()
        self.set_dtype(torch.float64)
        self.distances = tuple(sorted(distances))
        for name in ("nll_K", "tokens_K"):
            self.add_state(name, torch.zeros(len(self.distances), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll_BT: Tensor, distance_BT: Tensor) -> None:
        """Add a batch: nats of each target, and the distance that it asks over (0: it asks nothing)."""
        for k, distance in enumerate(self.distances):
            asked_BT = distance_BT == distance
            self.nll_K[k] += (nll_BT * asked_BT).sum(dtype=torch.float64)
            self.tokens_K[k] += asked_BT.sum()

    def compute(self) -> dict[str, Tensor]:
        """`perplexity` over all answers, and `perplexity_96` for those over 96 tokens, and so on."""
        by_distance = (self.nll_K / self.tokens_K).exp()
        overall = (self.nll_K.sum() / self.tokens_K.sum()).exp()
        named = {f"perplexity_{d}": by_distance[k] for k, d in enumerate(self.distances)}
        return {"perplexity": overall} | named
