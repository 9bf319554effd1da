"""Perplexity, NLL per note and per second, by position and by piece, as torchmetrics.

Every metric is a ratio of two sums over tokens, kept in float64 and summed over processes, never a mean of batch
means. NLL is in nats. Shapes: B lanes, T segment, K distances or position ranges, P pieces, F token families.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torchmetrics import Metric


class ExactSums(Metric):
    """A metric whose states are sums in float64, even if the module around it is cast to another precision."""

    full_state_update = False

    def add_sums(self, *names: str, shape: tuple[int, ...] = ()) -> None:
        """Add states that start at zero and are summed over processes."""
        for name in names:
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
    """Perplexity and NLL per token, per note and per second of music.

    Perplexities compare only within one tokenizer; nats per note and per second compare between tokenizers.
    """

    nll: Tensor
    tokens: Tensor
    notes: Tensor
    microseconds: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sums("nll", "tokens", "notes", "microseconds")

    def update(self, nll_BT: Tensor, is_real_BT: Tensor, is_note_BT: Tensor, microseconds_B: Tensor) -> None:
        """Add a batch: nats of each target, 0 where it is not scored; which begin a note; their music time, int64."""
        self.nll += nll_BT.sum(dtype=self.nll.dtype)
        self.tokens += is_real_BT.sum()
        self.notes += (is_note_BT & is_real_BT).sum()
        self.microseconds += microseconds_B.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return `nll`, `perplexity`, `nats_per_note`, `nats_per_second` (NaN without tokens) and `tokens`."""
        nll = self.nll / self.tokens
        return {
            "nll": nll,
            "perplexity": nll.exp(),
            "nats_per_note": self.nll / self.notes,
            "nats_per_second": 1e6 * self.nll / self.microseconds,
            "tokens": self.tokens,
        }


class PositionPerplexity(ExactSums):
    """Perplexity by position in the piece, in ranges that double: the benefit of more context.

    The first predicted token has position 1; it is the second of the piece.
    """

    STARTS = (0, *(2**k for k in range(7, 18)))
    """First position of each range, in tokens: 0, 128, 256, ... 131,072."""

    nll_K: Tensor
    tokens_K: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sums("nll_K", "tokens_K", shape=(len(self.STARTS),))

    def update(self, nll_BT: Tensor, is_real_BT: Tensor, position_B: Tensor) -> None:
        """Add a batch: nats of each target, which are scored, and the position of each lane's first scored target."""
        range_N = position_ranges(is_real_BT, position_B).flatten()
        dtype = self.nll_K.dtype
        self.nll_K.index_add_(0, range_N, (nll_BT * is_real_BT).to(dtype).flatten())
        self.tokens_K.index_add_(0, range_N, is_real_BT.to(dtype).flatten())

    def compute(self) -> dict[str, Tensor]:
        """Return `perplexity_0`, `perplexity_128`, ... by first position; NaN beyond the longest piece."""
        perplexity_K = (self.nll_K / self.tokens_K).exp()
        return {f"perplexity_{start}": perplexity_K[k] for k, start in enumerate(self.STARTS)}


class PieceNLL(ExactSums):
    """NLL of every piece by position range and token family, from which models are compared piece by piece."""

    nll_PKF: Tensor
    tokens_PKF: Tensor
    microseconds_P: Tensor

    def __init__(self, num_pieces: int, num_families: int) -> None:
        super().__init__()
        shape = (num_pieces, len(PositionPerplexity.STARTS), num_families)
        self.add_sums("nll_PKF", "tokens_PKF", shape=shape)
        self.add_sums("microseconds_P", shape=(num_pieces,))

    def update(
        self,
        nll_BT: Tensor,
        is_real_BT: Tensor,
        piece_B: Tensor,
        position_B: Tensor,
        family_BT: Tensor,
        microseconds_B: Tensor,
    ) -> None:
        """Add a batch, see `dsmr.batch.Segment`; `family_BT` may be of any value where nothing is scored."""
        piece_B = piece_B.clamp(min=0)  # a lane without a piece adds zeros
        range_BT = position_ranges(is_real_BT, position_B)
        _, num_ranges, num_families = self.nll_PKF.shape
        index_N = ((piece_B[:, None] * num_ranges + range_BT) * num_families + family_BT).flatten()
        dtype = self.nll_PKF.dtype
        self.nll_PKF.view(-1).index_add_(0, index_N, (nll_BT * is_real_BT).to(dtype).flatten())
        self.tokens_PKF.view(-1).index_add_(0, index_N, is_real_BT.to(dtype).flatten())
        self.microseconds_P.index_add_(0, piece_B, microseconds_B.to(dtype))

    def compute(self) -> dict[str, Tensor]:
        """Return the sums `nll_PKF`, `tokens_PKF` and `microseconds_P`."""
        return {"nll_PKF": self.nll_PKF, "tokens_PKF": self.tokens_PKF, "microseconds_P": self.microseconds_P}


class RecallPerplexity(ExactSums):
    """Perplexity of the answers in generated pieces, by their distance from the mark in tokens.

    1 is perfect recall, the number of marks (16) is chance.
    """

    nll_K: Tensor
    tokens_K: Tensor

    def __init__(self, distances: Sequence[int]) -> None:
        super().__init__()
        self.distances = tuple(sorted(distances))
        self.add_sums("nll_K", "tokens_K", shape=(len(self.distances),))

    def update(self, nll_BT: Tensor, distance_BT: Tensor) -> None:
        """Add a batch: nats of each target, and the distance of its answer (0 for targets that are no answers)."""
        for k, distance in enumerate(self.distances):
            asked_BT = distance_BT == distance
            self.nll_K[k] += (nll_BT * asked_BT).sum(dtype=self.nll_K.dtype)
            self.tokens_K[k] += asked_BT.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return `perplexity` over all answers, and by distance `perplexity_96`, ..."""
        by_distance = (self.nll_K / self.tokens_K).exp()
        overall = {"perplexity": (self.nll_K.sum() / self.tokens_K.sum()).exp()}
        return overall | {f"perplexity_{d}": by_distance[k] for k, d in enumerate(self.distances)}


def position_ranges(is_real_BT: Tensor, position_B: Tensor) -> Tensor:
    """Return the range of `PositionPerplexity.STARTS` of each target's position in its piece, (B, T)."""
    index_T = torch.arange(is_real_BT.shape[1], device=is_real_BT.device)
    first_B1 = is_real_BT.int().argmax(dim=1, keepdim=True)
    return torch.bucketize(position_B[:, None] + index_T - first_B1, _boundaries(is_real_BT.device), right=True)


@lru_cache(maxsize=16)  # copying them to a GPU again would wait for the GPU's queue
def _boundaries(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(PositionPerplexity.STARTS[1:], device=device)
