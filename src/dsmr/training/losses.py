"""Token losses, and the error for a loss or gradient that is NaN or Inf. B lanes, T segment, V vocabulary."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dsmr import UserError
from dsmr.batch import IGNORED
from dsmr.data.datamodule import MusicData


class NotFiniteError(UserError):
    """A loss or gradient became NaN or Inf; the message names the step, the piece and the position.

    If `is_undone`, weights, optimizer, memory, data stream and RNG are as they were before the failed step.
    """

    def __init__(self, message: str, *, is_undone: bool) -> None:
        super().__init__(message)
        self.is_undone = is_undone


def token_nll(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the nats of every target in float32, (B, T); 0 where the target is ignored."""
    logits_NV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)).flatten(0, 1)
    nll_N = F.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=IGNORED, reduction="none")
    return nll_N.view_as(targets_BT)


def piece_position(data: MusicData | None, piece: Tensor, position: Tensor) -> str:
    """Return `2004/x.midi from token 512 on`, or `another process` for a piece of -1."""
    if piece < 0:
        return "another process"
    name = f"piece {int(piece)}" if data is None else data.store.pieces[int(piece)].name
    return f"{name} from token {int(position):,} on"
