"""Perplexity and what belongs beside it, as torchmetrics.

Every figure is a ratio of two sums over tokens, kept in float64 and summed over processes: never a mean of batch
means. NLL is in nats. B lanes, T segment, V vocabulary, K distances.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class ExactSums(Metric):
    """A metric whose states are sums in float64, whatever precision the module around it is cast to."""

    full_state_update = False

    def add_sum(self, name: str, *shape: int) -> None:
        """Add a state that begins with zeros and is summed over processes."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> "ExactSums":
        super()._apply(fn, exclude_state)
        for name, default in self._defaults.items():
            assert isinstance(default, Tensor)
            exact = torch.float32 if getattr(self, name).device.type == "mps" else torch.float64
            self._defaults[name] = default.to(exact)
            setattr(self, name, getattr(self, name).to(exact))
        return self


class TokenNLL(ExactSums):
    """Perplexity, nats per token, per note and per second of music, over all tokens seen.

    Perplexities compare only within one tokenizer; nats per note and per second compare between tokenizers.
    """

    nll: Tensor
    tokens: Tensor
    notes: Tensor
    microseconds: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nll", "tokens", "notes", "microseconds"):
            self.add_sum(name)

    def update(self, nll_BT: Tensor, is_real_BT: Tensor, is_note_BT: Tensor, microseconds_B: Tensor) -> None:
        """Add a batch.

        Args:
            nll_BT: nats of each target, 0 where it is ignored.
            is_real_BT: bool, targets that count.
            is_note_BT: bool, targets that begin a note.
            microseconds_B: music time that the targets cover, int64.
        """
        self.nll += nll_BT.sum(dtype=self.nll.dtype)
        self.tokens += is_real_BT.sum()
        self.notes += (is_note_BT & is_real_BT).sum()
        self.microseconds += microseconds_B.sum()

    def compute(self) -> dict[str, Tensor]:
        """`nll`, `perplexity`, `nats_per_note`, `nats_per_second` (NaN where nothing was seen) and `tokens`."""
        nll = self.nll / self.tokens
        return {
            "nll": nll,
            "perplexity": nll.exp(),
            "nats_per_note": self.nll / self.notes,
            "nats_per_second": 1e6 * self.nll / self.microseconds,
            "tokens": self.tokens,
        }


class PositionPerplexity(ExactSums):
    """Perplexity by position in the piece, in stretches that double: what it helps to have heard what went before.

    The first token that is predicted has position 1, the second of the piece.
    """

    STARTS = (0, *(2**k for k in range(7, 18)))
    """First position of each stretch: 0, 128, 256, ... 131,072, in tokens."""

    nll_K: Tensor
    tokens_K: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nll_K", "tokens_K"):
            self.add_sum(name, len(self.STARTS))

    def update(self, nll_BT: Tensor, is_real_BT: Tensor, position_B: Tensor) -> None:
        """Add a batch: nats of each target, which of them count, and the position of each lane's first that does."""
        place_T = torch.arange(nll_BT.shape[1], device=nll_BT.device)
        first_B1 = is_real_BT.int().argmax(dim=1, keepdim=True)
        position_BT = position_B[:, None] + place_T - first_B1
        starts_K = torch.tensor(self.STARTS[1:], device=nll_BT.device)
        stretch_N = torch.bucketize(position_BT, starts_K, right=True).flatten()
        dtype = self.nll_K.dtype
        self.nll_K.index_add_(0, stretch_N, (nll_BT * is_real_BT).to(dtype).flatten())
        self.tokens_K.index_add_(0, stretch_N, is_real_BT.to(dtype).flatten())

    def compute(self) -> dict[str, Tensor]:
        """`perplexity_0`, `perplexity_128` and so on by first position; NaN where no piece is so long."""
        perplexity_K = (self.nll_K / self.tokens_K).exp()
        return {f"perplexity_{start}": perplexity_K[k] for k, start in enumerate(self.STARTS)}


class RecallPerplexity(ExactSums):
    """Perplexity of the answers of generated pieces, by their distance from the mark in tokens.

    1 is perfect memory, the number of marks (16) is chance.
    """

    nll_K: Tensor
    tokens_K: Tensor

    def __init__(self, distances: Sequence[int]) -> None:
        super().__init__()
        self.distances = tuple(sorted(distances))
        for name in ("nll_K", "tokens_K"):
            self.add_sum(name, len(self.distances))

    def update(self, nll_BT: Tensor, distance_BT: Tensor) -> None:
        """Add a batch: nats of each target, and the distance that it asks over (0: it asks nothing)."""
        for k, distance in enumerate(self.distances):
            asked_BT = distance_BT == distance
            self.nll_K[k] += (nll_BT * asked_BT).sum(dtype=self.nll_K.dtype)
            self.tokens_K[k] += asked_BT.sum()

    def compute(self) -> dict[str, Tensor]:
        """`perplexity` over all answers, and `perplexity_96` for those over 96 tokens, and so on."""
        by_distance = (self.nll_K / self.tokens_K).exp()
        overall = (self.nll_K.sum() / self.tokens_K.sum()).exp()
        named = {f"perplexity_{d}": by_distance[k] for k, d in enumerate(self.distances)}
        return {"perplexity": overall} | named
