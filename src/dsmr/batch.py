"""A batch: one segment for every lane. Shared by the streams that make it and the training that reads it.

Shapes: B lanes, T segment length.
"""

from typing import NamedTuple

from torch import Tensor

IGNORED = -100
"""Target that counts nowhere: padding behind a piece's end, and lanes that ran out of pieces."""


class Segment(NamedTuple):
    """One batch: a segment for every lane.

    Attributes:
        tokens_BT: what the model reads, int64.
        targets_BT: what it predicts there, the next token, int64; `IGNORED` where nothing counts.
        is_start_B: bool, lanes that begin a new piece here.
        piece_B: number of the piece in the store, -1 for a lane that ran out.
        position_B: place in its piece of the first target that counts, in tokens; BOS has place 0.
        microseconds_B: this segment's share of its piece's music time, int64; the shares of a piece add up to its
            length. An integer, because a trainer in half precision casts every float of a batch.
        distance_BT: for generated pieces, how far back the target's answer lies in tokens; 0 elsewhere.
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
