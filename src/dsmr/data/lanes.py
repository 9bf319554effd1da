"""Lanes: batch rows that stream one piece after another, so that a memory can follow each of them.

Shapes: B lanes of this process, T segment length. A plan gives for every step and lane the piece and the segment
within it; it is a function of (seed, epoch) alone, so a batch can be made at any step, in any process, and a run
continues anywhere.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from dsmr.batch import IGNORED, Segment
from dsmr.data.store import TokenStore
from dsmr.data.tokenizer import MASK, PAD

PIANO_KEYS = (21, 108)
"""Lowest and highest MIDI pitch of a piano with 88 keys."""


@dataclass(frozen=True)
class Plan:
    """Who reads what, when.

    Attributes:
        piece_NB: number of the piece at each step and lane, -1 where the lane has run out.
        first_NB: place in the piece of the first token that is read; BOS has place 0.
        count_NB: tokens that are read, at most T.
        context_NB: how many of these are only context: what they predict is not scored.
        is_start_NB: where the memory is emptied.
    """

    piece_NB: NDArray[np.int64]
    first_NB: NDArray[np.int64]
    count_NB: NDArray[np.int64]
    context_NB: NDArray[np.int64]
    is_start_NB: NDArray[np.bool_]

    @classmethod
    def of(cls, piece_NB: NDArray[np.int64], first_NB: NDArray[np.int64], last_NB: NDArray[np.int64]) -> "Plan":
        """Plan of a stream: all is scored, and a piece's beginning empties the memory."""
        count_NB = np.where(piece_NB < 0, 0, last_NB - first_NB)
        return cls(piece_NB, first_NB, count_NB, np.zeros_like(first_NB), first_NB == 0)

    @property
    def num_steps(self) -> int:
        """N, until the last lane has run out."""
        return len(self.piece_NB)


def deal(loads: Sequence[int], num_lanes: int, rng: np.random.Generator) -> list[list[int]]:
    """Deal pieces to lanes, the longest first to the lane that has least, so that lanes end close together.

    Pieces of one load are dealt in random order; within a lane, the order is shuffled.

    Args:
        loads: segments of each piece.
        num_lanes: lanes of all processes.
        rng: of (seed, epoch).

    Returns:
        for each lane, indices into `loads`.
    """
    order = rng.permutation(len(loads))
    order = order[np.argsort(-np.asarray(loads)[order], kind="stable")]
    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    heap = [(0, lane) for lane in range(num_lanes)]
    for index in order:
        load, lane = heapq.heappop(heap)
        lanes[lane].append(int(index))
        heapq.heappush(heap, (load + loads[index], lane))
    for pieces in lanes:
        rng.shuffle(pieces)
    return lanes


def plan_epoch(
    numbers: Sequence[int],
    lengths: Sequence[int],
    *,
    segment_length: int,
    num_lanes: int,
    seed: int,
    epoch: int,
) -> Plan:
    """Plan of an epoch over the pieces `numbers`, which have `lengths` tokens (BOS included)."""
    loads = [-(-(length - 1) // segment_length) for length in lengths]
    rng = np.random.default_rng([seed, epoch])
    lanes = deal(loads, num_lanes, rng)
    num_steps = max(sum(loads[index] for index in lane) for lane in lanes)
    piece_NB = np.full((num_steps, num_lanes), -1, dtype=np.int64)
    first_NB, last_NB = np.zeros_like(piece_NB), np.zeros_like(piece_NB)
    for lane, indices in enumerate(lanes):
        step = 0
        for index in indices:
            here = slice(step, step + loads[index])
            piece_NB[here, lane] = numbers[index]
            first_NB[here, lane] = np.arange(loads[index]) * segment_length
            last_NB[here, lane] = np.minimum(first_NB[here, lane] + segment_length, lengths[index] - 1)
            step += loads[index]
    return Plan.of(piece_NB, first_NB, last_NB)


class LaneReader:
    """Makes the batch of any step of a plan.

    Args:
        store: the tokens.
        segment_length: T.
        transpositions: tables (shifts, V) as of `dsmr.data.tokenizer.transpositions`, or None.
        pitch_range: lowest and highest pitch that the tokenizer has.
        seed: of the transpositions.
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

    def read(self, plan: Plan, step: int, lanes: slice, epoch: int) -> Segment:
        """Batch of one step for some of the lanes."""
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
            read = slice(piece.start + first, piece.start + first + count + 1)
            ids = self._transposed(self.store.tokens[read], int(number), epoch)
            targets[lane, context:count] = ids[1 + context :]
            tokens[lane, :count] = ids[:-1]
            microseconds[lane] = round(1e6 * piece.seconds * (count - context) / (piece.length - 1))
            if self.store.marks is not None:
                marks = self.store.marks[read]
                distance[lane, context:count] = marks[1 + context :]
                tokens[lane, :count][marks[:-1] > 0] = MASK
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

    def _transposed(self, ids: NDArray[np.uint16], number: int, epoch: int) -> NDArray[np.uint16]:
        """Transpose by an interval drawn for (seed, epoch, piece), see `allowed_shifts`."""
        if self.transpositions is None:
            return ids
        piece, semitones = self.store.pieces[number], len(self.transpositions) // 2
        lowest, highest = allowed_shifts(piece.pitch_min, piece.pitch_max, semitones, self.pitch_range)
        shift = _draw(self.seed, epoch, number, lowest, highest)
        return self.transpositions[shift + semitones][ids]


def allowed_shifts(pitch_min: int, pitch_max: int, semitones: int, pitch_range: tuple[int, int]) -> tuple[int, int]:
    """Lowest and highest shift in semitones of a piece; 0 is always among them.

    A transposed piece stays within the 88 keys of a piano and the tokenizer's pitches. A piece that itself has pitches
    beyond the 88 keys stays within its own lowest or highest pitch there.

    Args:
        pitch_min: lowest pitch of the piece.
        pitch_max: highest.
        semitones: the most that a piece is moved, either way.
        pitch_range: lowest and highest pitch that the tokenizer has.
    """
    bottom = max(min(PIANO_KEYS[0], pitch_min), pitch_range[0])
    top = min(max(PIANO_KEYS[1], pitch_max), pitch_range[1])
    return max(-semitones, bottom - pitch_min), min(semitones, top - pitch_max)


@lru_cache(maxsize=4096)  # every segment of a piece asks; making a generator takes longer than all the rest
def _draw(seed: int, epoch: int, number: int, lowest: int, highest: int) -> int:
    return int(np.random.default_rng([seed, epoch, number]).integers(lowest, highest + 1))
