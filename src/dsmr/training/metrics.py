"""Perplexity and what belongs beside it, as torchmetrics.

Every figure is a ratio of two sums over tokens, kept in float64 and summed over processes: never a mean of batch
means. NLL is in nats. B lanes, T segment, V vocabulary, K distances or stretches, P pieces, F families.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

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
        stretch_N = stretches(is_real_BT, position_B, self.STARTS).flatten()
        dtype = self.nll_K.dtype
        self.nll_K.index_add_(0, stretch_N, (nll_BT * is_real_BT).to(dtype).flatten())
        self.tokens_K.index_add_(0, stretch_N, is_real_BT.to(dtype).flatten())

    def compute(self) -> dict[str, Tensor]:
        """`perplexity_0`, `perplexity_128` and so on by first position; NaN where no piece is so long."""
        perplexity_K = (self.nll_K / self.tokens_K).exp()
        return {f"perplexity_{start}": perplexity_K[k] for k, start in enumerate(self.STARTS)}


class PieceNLL(ExactSums):
    """NLL of every piece by position in it and by family of tokens: what differences between models are made of.

    Args:
        num_pieces: P, of the store.
        num_families: F.
    """

    nll_PKF: Tensor
    tokens_PKF: Tensor
    microseconds_P: Tensor

    def __init__(self, num_pieces: int, num_families: int) -> None:
        super().__init__()
        shape = (num_pieces, len(PositionPerplexity.STARTS), num_families)
        self.add_sum("nll_PKF", *shape)
        self.add_sum("tokens_PKF", *shape)
        self.add_sum("microseconds_P", num_pieces)

    def update(
        self,
        nll_BT: Tensor,
        is_real_BT: Tensor,
        piece_B: Tensor,
        position_B: Tensor,
        family_BT: Tensor,
        microseconds_B: Tensor,
    ) -> None:
        """Add a batch.

        Args:
            nll_BT: nats of each target, 0 where it is ignored.
            is_real_BT: bool, targets that count.
            piece_B: number of each lane's piece, -1 for none.
            position_B: of each lane's first target that counts.
            family_BT: of each target; anything where it is ignored.
            microseconds_B: music time that the targets cover, int64.
        """
        piece_B = piece_B.clamp(min=0)  # a lane without a piece adds nothing
        stretch_BT = stretches(is_real_BT, position_B, PositionPerplexity.STARTS)
        _, num_stretches, num_families = self.nll_PKF.shape
        place_N = ((piece_B[:, None] * num_stretches + stretch_BT) * num_families + family_BT).flatten()
        dtype = self.nll_PKF.dtype
        self.nll_PKF.view(-1).index_add_(0, place_N, (nll_BT * is_real_BT).to(dtype).flatten())
        self.tokens_PKF.view(-1).index_add_(0, place_N, is_real_BT.to(dtype).flatten())
        self.microseconds_P.index_add_(0, piece_B, microseconds_B.to(dtype))

    def compute(self) -> dict[str, Tensor]:
        """`nll_PKF`, `tokens_PKF` and `microseconds_P`, sums."""
        return {"nll_PKF": self.nll_PKF, "tokens_PKF": self.tokens_PKF, "microseconds_P": self.microseconds_P}


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


def stretches(is_real_BT: Tensor, position_B: Tensor, starts: Sequence[int]) -> Tensor:
    """Which stretch of its piece each target lies in, (B, T).

    Args:
        is_real_BT: bool, targets that count.
        position_B: of each lane's first target that counts, in tokens.
        starts: first position of each stretch, from 0.
    """
    place_T = torch.arange(is_real_BT.shape[1], device=is_real_BT.device)
    first_B1 = is_real_BT.int().argmax(dim=1, keepdim=True)
    position_BT = position_B[:, None] + place_T - first_B1
    return torch.bucketize(position_BT, _tensor(tuple(starts[1:]), is_real_BT.device), right=True)


@lru_cache(maxsize=16)  # sending it to a GPU anew would wait for all that the GPU has to do
def _tensor(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)
