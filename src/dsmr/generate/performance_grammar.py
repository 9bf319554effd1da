"""The grammar of `performance` tokens: exactly the order that the encoder writes.

B lanes, P = 128 pitches, Q = P + 1, V vocabulary, K = 6 kinds of tokens, N shifts or velocities.

Within a tick: note-offs by rising pitch, then note-ons by rising pitch, with a velocity before a note-on only when it
changes. Between ticks: shifts of a whole second (100 ticks), then at most one shorter shift.

                    .--------------------------- next tick ----------------------------.
                    v                                                                  |
    BOS --> [note-off p < q < ...] --> [(velocity) note-on p, (velocity) note-on q ...] --> [100] [100] ... [rest]
                    |
                    '--> EOS, if no note sounds

What one token decides about the next is a lookup by its kind. What depends on more is in four state columns per lane,

    column       0 lowest pitch     1 lowest pitch      2 velocity bin        3 tick
                 that may start     that may end        (-1: none so far)
    shift n      0                  0                   -                     + n
    note-off p   -                  p + 1               -                     -
    note-on p    p + 1              128 (none)          -                     -
    velocity v   -                  -                   v                     -

and in which pitches sound. Every row of this table is `state * keep + add`, so that lanes with different tokens
advance in one operation, without branches.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsmr.data.performance import NUM_PITCHES, Performance
from dsmr.data.vocabulary import BOS, EOS, MASK, PAD, SPECIAL_TOKENS
from dsmr.generate.grammar import Grammar

FREE, WHOLE, REST, VELOCITY, NOTE_ON, NOTE_OFF = range(6)
"""Kinds of tokens: special, a shift of a whole second, a shorter shift, and so on."""


class PerformanceGrammar(Grammar):
    """Allows only token streams that `Performance` itself would write, so that decoding loses and changes nothing.

    Only what sounds may end, only what is silent may start, and a piece ends with the end of a note when nothing
    sounds. With `max_note_ticks`, notes that have sounded this long are ended, the lowest first.
    """

    def __init__(
        self, tokenizer: Performance, device: torch.device | str = "cpu", max_note_ticks: int | None = None
    ) -> None:
        self.device = torch.device(device)
        groups = (
            (tokenizer.note_on, NUM_PITCHES, NOTE_ON),
            (tokenizer.note_off, NUM_PITCHES, NOTE_OFF),
            (tokenizer.velocity, len(tokenizer.velocities), VELOCITY),
            (tokenizer.shift, tokenizer.num_shifts, REST),
        )
        kind_V, value_V = np.full(len(tokenizer), FREE), np.zeros(len(tokenizer), np.int64)
        for first, count, kind in groups:
            kind_V[first : first + count], value_V[first : first + count] = kind, np.arange(count)
        assert [first for first, _, _ in groups] == [4, 132, 260, 292], "`allowed` joins its parts in this order"
        kind_V[tokenizer.shift + tokenizer.num_shifts - 1] = WHOLE
        value_V[tokenizer.shift :] += 1  # the first shift is one tick
        self.kinds, self.values, self.num_shifts = kind_V, value_V, tokenizer.num_shifts
        self.after_KV = self._followers(kind_V)
        self.keep_V4, self.add_V4, self.note_V3 = self._transitions(kind_V, value_V)
        self.pitch_P = torch.arange(NUM_PITCHES, device=self.device)
        self.velocity_N = torch.arange(len(tokenizer.velocities), device=self.device)
        self.length_N = torch.arange(1, self.num_shifts + 1, device=self.device)
        self.max_note_ticks, self.note_off = max_note_ticks, tokenizer.note_off
        # For sampling, all shifts are of one kind: whether a gap exceeds a second must not change its probability.
        kind_V = np.where(kind_V == WHOLE, REST, kind_V)
        self.kinds_VK = torch.as_tensor(kind_V[:, None] == np.arange(6), dtype=torch.float32, device=self.device)
        self.kinds_VK[[PAD, BOS, MASK]] = 0  # never sampled, so their probability goes to no kind; EOS stays FREE
        self.is_off_2 = torch.tensor([False, True], device=self.device)

    def _followers(self, kind_V: NDArray[np.int64]) -> Tensor:
        """Mask of the tokens that may follow a token of each kind, as far as the kind decides it, (6, V)."""
        after_KV = np.ones((6, len(kind_V)), bool)
        after_KV[:, kind_V == FREE] = False
        after_KV[VELOCITY] = kind_V == NOTE_ON
        after_KV[REST, (kind_V == REST) | (kind_V == WHOLE)] = False  # whole seconds come first
        after_KV[NOTE_OFF, EOS] = True  # if nothing sounds: `allowed` sees to that
        return torch.as_tensor(after_KV, device=self.device)

    def _transitions(self, kind_V: NDArray[np.int64], value_V: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Tables of the state's transitions, see the module: keep and add, (V, 4) each, and the note, (V, 3).

        The columns of the note are the token's kind, its pitch (P, a dummy, for other tokens), and 1 for a note-on.
        """
        keep_V4, add_V4 = np.ones((len(kind_V), 4), np.int64), np.zeros((len(kind_V), 4), np.int64)
        is_shift, is_on, is_off = (kind_V == REST) | (kind_V == WHOLE), kind_V == NOTE_ON, kind_V == NOTE_OFF
        keep_V4[is_shift, :2] = 0  # a new tick: any pitch again
        add_V4[is_shift, 3] = value_V[is_shift]
        keep_V4[is_on, :2] = 0
        add_V4[is_on, 0], add_V4[is_on, 1] = value_V[is_on] + 1, NUM_PITCHES  # note-offs come before note-ons
        keep_V4[is_off, 1] = 0
        add_V4[is_off, 1] = value_V[is_off] + 1
        keep_V4[kind_V == VELOCITY, 2] = 0
        add_V4[kind_V == VELOCITY, 2] = value_V[kind_V == VELOCITY]
        note_V3 = np.stack([kind_V, np.where(is_on | is_off, value_V, NUM_PITCHES), is_on], axis=1)
        tables = (torch.as_tensor(table, device=self.device) for table in (keep_V4, add_V4, note_V3))
        return tuple(tables)  # type: ignore[return-value]

    def begin(self, ids: Sequence[int], num_lanes: int, first_tick: int = 0) -> None:
        """See `Grammar.begin`."""
        # Columns 0 and 1 depend on the last tick alone. Everything before it is thus reduced to the sounding pitches,
        # the velocity and the tick with NumPy, and only the tokens from the last shift on are advanced one by one.
        ids_N = np.asarray(ids, np.int64)
        kinds, values = self.kinds[ids_N], self.values[ids_N]
        shifts = np.flatnonzero((kinds == WHOLE) | (kinds == REST))
        before = int(shifts[-1]) if len(shifts) else 0
        notes = np.flatnonzero((kinds[:before] == NOTE_ON) | (kinds[:before] == NOTE_OFF))
        sounding = np.zeros(NUM_PITCHES + 1, bool)
        sounding[values[notes]] = kinds[notes] == NOTE_ON  # NumPy keeps the last of repeated indices: the latest event
        velocities = values[:before][kinds[:before] == VELOCITY]
        state = [0, 0, int(velocities[-1]) if len(velocities) else -1, int(values[shifts[:-1]].sum())]
        self.sounding_BQ = torch.from_numpy(sounding).to(self.device).repeat(num_lanes, 1)
        self.state_B4 = torch.tensor(state, device=self.device).repeat(num_lanes, 1)
        self.last_B = torch.full((num_lanes,), FREE, device=self.device)
        self.special_B4 = torch.zeros(num_lanes, len(SPECIAL_TOKENS), dtype=torch.bool, device=self.device)
        self.shift_BN = torch.ones(num_lanes, self.num_shifts, dtype=torch.bool, device=self.device)
        self.first_tick, self.is_waiting = first_tick, True
        # the age of the prompt's notes counts from its last tick
        self.onset_BQ = torch.full((num_lanes, NUM_PITCHES + 1), state[3], device=self.device)
        for id_ in ids_N[before:]:
            self.advance(torch.full((num_lanes,), int(id_), device=self.device))

    @property
    def tick_B(self) -> Tensor:  # type: ignore[override]
        """Current tick of each lane."""
        return self.state_B4[:, 3]

    def sounding(self, lane: int) -> list[int]:
        """Return the pitches that sound."""
        return self.sounding_BQ[lane, :NUM_PITCHES].nonzero()[:, 0].tolist()

    def allowed(self, *, may_end: bool) -> Tensor:
        """See `Grammar.allowed`."""
        state_B41 = self.state_B4[:, :, None]
        # Row 0: pitches that may start, i.e. are silent and not below column 0. Row 1: the same for ends and column 1.
        is_right_B2P = self.sounding_BQ[:, None, :NUM_PITCHES] == self.is_off_2[:, None]
        pitch_B2P = is_right_B2P & (self.pitch_P >= state_B41[:, :2])
        velocity_B1 = state_B41[:, 2]
        # a velocity must change, and a note-on must be able to follow it
        velocity_BN = (self.velocity_N != velocity_B1) & pitch_B2P[:, 0].any(dim=-1, keepdim=True)
        pitch_B2P[:, 0] &= velocity_B1 >= 0  # after the line above: the first note-on needs a velocity before it
        if may_end:
            self.special_B4[:, EOS] = ~self.sounding_BQ[:, :NUM_PITCHES].any(dim=-1)
        allowed_BV = torch.cat([self.special_B4, pitch_B2P.flatten(1), velocity_BN, self.shift_BN], dim=1)
        allowed_BV &= self.after_KV.index_select(0, self.last_B)
        if self.is_waiting:
            # Before `first_tick` only shifts that do not stop short of it: none can follow a shift below a second.
            wait_B1 = self.first_tick - state_B41[:, 3]
            self.is_waiting = bool((wait_B1 > 0).any())  # ticks never fall, so this is checked no more afterwards
            allowed_BV[:, : -self.num_shifts] &= wait_B1 <= 0
            allowed_BV[:, -self.num_shifts :] &= (self.length_N >= wait_B1) | (self.length_N == self.num_shifts)
        return allowed_BV if self.max_note_ticks is None else self._without_long_notes(allowed_BV, self.max_note_ticks)

    def _without_long_notes(self, allowed_BV: Tensor, max_ticks: int) -> Tensor:
        """Allow only the end of the lowest note that has sounded too long, if there is one."""
        age_BP = self.state_B4[:, 3:] - self.onset_BQ[:, :NUM_PITCHES]
        ends_BP = allowed_BV[:, self.note_off : self.note_off + NUM_PITCHES]
        is_old_BP = (age_BP >= max_ticks) & ends_BP
        only_BV = torch.zeros_like(allowed_BV)
        only_BV.scatter_(1, is_old_BP.int().argmax(dim=-1, keepdim=True) + self.note_off, 1)
        return torch.where(is_old_BP.any(dim=-1, keepdim=True), only_BV, allowed_BV)

    def advance(self, tokens_B: Tensor) -> None:
        """See `Grammar.advance`."""
        keep_B4, add_B4 = self.keep_V4.index_select(0, tokens_B), self.add_V4.index_select(0, tokens_B)
        self.state_B4 = torch.addcmul(add_B4, self.state_B4, keep_B4)
        note_B3 = self.note_V3.index_select(0, tokens_B)
        # tokens that are not notes write into the dummy pitch P
        self.sounding_BQ.scatter_(1, note_B3[:, 1:2], note_B3[:, 2:].bool())
        self.last_B = note_B3[:, 0]
        if self.max_note_ticks is not None:
            is_on_B1, pitch_B1 = note_B3[:, 2:] > 0, note_B3[:, 1:2]
            onset_B1 = torch.where(is_on_B1, self.state_B4[:, 3:], self.onset_BQ.gather(1, pitch_B1))
            self.onset_BQ.scatter_(1, pitch_B1, onset_B1)
