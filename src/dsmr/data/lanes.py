"""Lanes: batch rows that stream one piece after another, so that the memory of a row follows one piece at a time.

Shapes: N steps of an epoch, B lanes, T segment length. A plan lists the piece and the segment of every step and lane.
Pieces are dealt longest first, each to the lane with the fewest segments so far; then each lane is shuffled:

    pieces of 4, 3, 2, 2 and 1 segments, 2 lanes:                 shuffled, an epoch of 6 steps:

    A (4) -> lane 0          C (2) -> lane 1, as 3 < 4            step    0  1  2  3  4  5
    B (3) -> lane 1          D (2) -> lane 0, as 4 < 5            lane 0  D0 D1 A0 A1 A2 A3
                             E (1) -> lane 1, as 5 < 6            lane 1  C0 C1 E0 B0 B1 B2

A plan is a function of (seed, epoch) alone. Any process can thus make the batch of any step, and a run resumes
anywhere.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dsmr.batch import IGNORED, Segment
from dsmr.data.store import TokenStore
from dsmr.data.transposition import allowed_shifts, random_shift
from dsmr.data.vocabulary import MASK, PAD


@dataclass(frozen=True)
class Plan:
    """Piece and tokens that every lane reads at every step of an epoch.

    Attributes:
        piece_NB: number of the piece, -1 where the lane has run out of pieces.
        first_NB: position in the piece of the first token that is read; BOS is at 0.
        count_NB: number of tokens that are read, at most T.
        context_NB: how many of these are context only, so that their targets are not scored.
        is_start_NB: True where the memory is emptied first.
    """

    piece_NB: NDArray[np.int64]
    first_NB: NDArray[np.int64]
    count_NB: NDArray[np.int64]
    context_NB: NDArray[np.int64]
    is_start_NB: NDArray[np.bool_]

    @property
    def num_steps(self) -> int:
        """N, the number of segments of the longest lane."""
        return len(self.piece_NB)


def deal_pieces(loads: Sequence[int], num_lanes: int, rng: np.random.Generator) -> list[list[int]]:
    """Deal pieces with `loads` segments to lanes; returns the indices of each lane's pieces.

    Longest first, to the lane with the least load: short pieces at the end fill the gaps, so that all lanes end within
    one piece of each other, and few steps have empty lanes. Pieces of equal load are dealt in random order. This order
    would make every epoch run from long to short pieces, so each lane is shuffled afterwards.
    """
    order = rng.permutation(len(loads))
    order = order[np.argsort(-np.asarray(loads)[order], kind="stable")]  # stable: ties keep the random order
    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    heap = [(0, lane) for lane in range(num_lanes)]
    for index in order:
        load, lane = heapq.heappop(heap)
        lanes[lane].append(int(index))
        heapq.heappush(heap, (load + loads[index], lane))
    for pieces in lanes:
        rng.shuffle(pieces)
    return lanes


def plan_stream(
    numbers: Sequence[int], lengths: Sequence[int], segment_length: int, num_lanes: int, *, seed: int, epoch: int
) -> Plan:
    """Plan an epoch over the pieces `numbers`, which have `lengths` tokens (BOS included)."""
    # one token less than the piece has: the last one, EOS, is only a target
    loads = [-(-(length - 1) // segment_length) for length in lengths]
    lanes = deal_pieces(loads, num_lanes, np.random.default_rng([seed, epoch]))
    num_steps = max(sum(loads[index] for index in lane) for lane in lanes)
    piece_NB = np.full((num_steps, num_lanes), -1, dtype=np.int64)
    first_NB, count_NB = np.zeros_like(piece_NB), np.zeros_like(piece_NB)
    for lane, indices in enumerate(lanes):
        step = 0
        for index in indices:
            here = slice(step, step + loads[index])
            piece_NB[here, lane] = numbers[index]
            first_NB[here, lane] = np.arange(loads[index]) * segment_length
            count_NB[here, lane] = np.minimum(segment_length, lengths[index] - 1 - first_NB[here, lane])
            step += loads[index]
    return Plan(piece_NB, first_NB, count_NB, np.zeros_like(piece_NB), first_NB == 0)


class LaneReader:
    """Makes the batch of any step of a plan.

    Transposes by the tables `transpositions` (shifts, V) of `transposition_tables`, within the tokenizer's
    `pitch_range`; `seed` is that of the shifts.
    """

    def __init__(
        self,
        store: TokenStore,
        segment_length: int,
        *,
        transpositions: NDArray[np.uint16] | None = None,
        pitch_range: tuple[int, int] = (0, 127),
        seed: int = 0,
    ) -> None:
        self.store, self.segment_length, self.seed = store, segment_length, seed
        self.transpositions, self.pitch_range = transpositions, pitch_range

    def read_segment(self, plan: Plan, step: int, lanes: slice, epoch: int) -> Segment:
        """Make the batch of one step for some of the lanes."""
        pieces, firsts, counts, contexts = (
            array[step, lanes] for array in (plan.piece_NB, plan.first_NB, plan.count_NB, plan.context_NB)
        )
        shape = (len(pieces), self.segment_length)
        tokens, targets = np.full(shape, PAD, np.int64), np.full(shape, IGNORED, np.int64)
        distance, microseconds = np.zeros(shape, np.int64), np.zeros(len(pieces), np.int64)
        for lane, (number, first, count, context) in enumerate(zip(pieces, firsts, counts, contexts, strict=True)):
            if number < 0:
                continue
            piece = self.store.pieces[number]
            # One token more than is read, and shifted by one below: targets are shifted before the piece is cut into
            # segments, so that the last token of a segment has a target as well.
            read = slice(piece.start + first, piece.start + first + count + 1)
            ids = self._transpose(self.store.tokens[read], int(number), epoch)
            targets[lane, context:count] = ids[1 + context :]
            tokens[lane, :count] = ids[:-1]
            microseconds[lane] = round(1e6 * piece.seconds * (count - context) / (piece.length - 1))
            if self.store.marks is not None:
                marks = self.store.marks[read]
                distance[lane, context:count] = marks[1 + context :]
                tokens[lane, :count][marks[:-1] > 0] = MASK  # an answer is predicted, but never read
        return Segment(
            tokens_BT=torch.from_numpy(tokens),
            targets_BT=torch.from_numpy(targets),
            is_start_B=torch.from_numpy(plan.is_start_NB[step, lanes].copy()),
            piece_B=torch.from_numpy(pieces.copy()),
            position_B=torch.from_numpy(firsts + contexts + 1),
            microseconds_B=torch.from_numpy(microseconds),
            distance_BT=torch.from_numpy(distance),
            step=step,
        )

    def _transpose(self, ids: NDArray[np.uint16], number: int, epoch: int) -> NDArray[np.uint16]:
        """Transpose by a shift that is the same for all segments of a piece in an epoch."""
        if self.transpositions is None:
            return ids
        piece, semitones = self.store.pieces[number], len(self.transpositions) // 2
        lowest, highest = allowed_shifts(piece.pitch_min, piece.pitch_max, semitones, self.pitch_range)
        shift = random_shift(self.seed, epoch, number, lowest, highest)
        return self.transpositions[shift + semitones][ids]
