"""A batch: one segment for every lane, made by `data` and read by `training`.

Shapes: B lanes, T segment length.
"""

from typing import NamedTuple

from torch import Tensor

IGNORED = -100
"""Target that is not scored: padding after the end of a piece, and lanes that ran out of pieces."""


class Segment(NamedTuple):
    """One batch: a segment for every lane.

    Attributes:
        tokens_BT: inputs, int64.
        targets_BT: the next tokens, int64; `IGNORED` where nothing is scored.
        is_start_B: bool, lanes that begin a new piece with this segment.
        piece_B: number of the piece in the store, -1 for a lane that ran out of pieces.
        position_B: position in its piece of the first scored target, in tokens; BOS has position 0.
        microseconds_B: this segment's share of the music time of its piece, int64; the shares add up to the length
            of the piece. An integer, because a trainer in half precision casts every float of a batch.
        distance_BT: for generated pieces, how many tokens back the answer of the target was; 0 elsewhere.
        step: number of the batch within its epoch.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    is_start_B: Tensor
    piece_B: Tensor
    position_B: Tensor
    microseconds_B: Tensor
    distance_BT: Tensor
    step: int
