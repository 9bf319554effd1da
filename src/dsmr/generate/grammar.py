"""Which tokens may follow, so that all that is drawn is music: nothing is dropped or changed when it is decoded.

B lanes, P = 128 pitches, Q = P + 1, V vocabulary, K kinds of tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from miditok import MusicTokenizer, PerTok
from numpy.typing import NDArray
from torch import Tensor

from dsmr import UserError
from dsmr.data.tokenizer import (
    BOS,
    EOS,
    MASK,
    PAD,
    TICKS_PER_SECOND,
    TRACK_END,
    TRACK_START,
    Performance,
)
from dsmr.data.vocabulary import NOTE_ON_TYPES, SPECIAL_TOKENS

NUM_PITCHES = 128
GLOBAL_TYPES = ("TimeSig", "Tempo", "KeySig", "Program")
"""MidiTok's types that may stand before the first note."""
LATE_TYPES = ("PedalOff", "ControlChange", "PitchBend")
"""MidiTok's types that may stand after the last note."""
FREE, WHOLE, REST, VELOCITY, NOTE_ON, NOTE_OFF = range(6)
"""What the last token was: none, a shift of a whole second, a shorter one, and so on."""


class Grammar(ABC):
    """What each lane may draw next.

    Attributes:
        tick_B: time of each lane in the tokenizer's smallest steps, where tokens tell it.
        kinds_VK: 1 where a token is of a kind that keeps its probability, see `dsmr.generate.sampling.draw`; or None.
    """

    tick_B: Tensor
    kinds_VK: Tensor | None = None

    @abstractmethod
    def begin(self, ids: Sequence[int], num_lanes: int, first_tick: int = 0) -> None:
        """All lanes have read the same tokens, BOS first; no event may come before `first_tick`."""

    @abstractmethod
    def allowed(self, *, may_end: bool) -> Tensor:
        """Which tokens may follow, bool (B, V), at least one in each lane; EOS only where it `may_end`."""

    @abstractmethod
    def advance(self, tokens_B: Tensor) -> None:
        """Each lane has drawn a token; those that have ended draw PAD."""


class PerformanceGrammar(Grammar):
    """The order that `Performance` writes: encoding what was decoded gives the same tokens.

    In each tick note-offs come before note-ons, both by rising pitch; only what sounds ends, only what is silent
    begins; a velocity stands right before a note-on, and only when it changes; shifts are whole seconds but for the
    last; the piece ends with a note's end, when nothing sounds.

    Args:
        tokenizer: whose ids these are.
        device: where the state lies.
        max_note_ticks: notes that sound so long are ended, the lowest first; None leaves it to the model.
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
        assert [first for first, _, _ in groups] == [4, 132, 260, 292], "the order of the mask's parts"
        kind_V[tokenizer.shift + tokenizer.num_shifts - 1] = WHOLE
        value_V[tokenizer.shift :] += 1
        self.kinds, self.values, self.num_shifts = kind_V, value_V, tokenizer.num_shifts
        self.after_KV = self._followers(kind_V)
        self.keep_V4, self.add_V4, self.note_V3 = self._changes(kind_V, value_V)
        self.pitch_P = torch.arange(NUM_PITCHES, device=self.device)
        self.velocity_N = torch.arange(len(tokenizer.velocities), device=self.device)
        self.length_N = torch.arange(1, self.num_shifts + 1, device=self.device)
        self.max_note_ticks, self.note_off = max_note_ticks, tokenizer.note_off
        kind_V = np.where(kind_V == WHOLE, REST, kind_V)
        self.kinds_VK = torch.as_tensor(kind_V[:, None] == np.arange(6), dtype=torch.float32, device=self.device)
        self.kinds_VK[[PAD, BOS, MASK]] = 0  # never drawn, and nobody's share
        self.is_off_2 = torch.tensor([False, True], device=self.device)

    def _followers(self, kind_V: NDArray[np.int64]) -> Tensor:
        """Which tokens may follow a token of each kind, for all that its kind tells, (6, V)."""
        after_KV = np.ones((6, len(kind_V)), bool)
        after_KV[:, kind_V == FREE] = False
        after_KV[VELOCITY] = kind_V == NOTE_ON
        after_KV[REST, (kind_V == REST) | (kind_V == WHOLE)] = False
        after_KV[NOTE_OFF, EOS] = True
        return torch.as_tensor(after_KV, device=self.device)

    def _changes(self, kind_V: NDArray[np.int64], value_V: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """What each token makes of the state: `state * keep + add`, (V, 4) each, and of which pitch; see `begin`.

        The third has, in each row, the token's kind, its pitch (or the one behind all pitches), and whether it sounds.
        """
        keep_V4, add_V4 = np.ones((len(kind_V), 4), np.int64), np.zeros((len(kind_V), 4), np.int64)
        is_shift, is_on, is_off = (kind_V == REST) | (kind_V == WHOLE), kind_V == NOTE_ON, kind_V == NOTE_OFF
        keep_V4[is_shift, :2] = 0
        add_V4[is_shift, 3] = value_V[is_shift]
        keep_V4[is_on, :2] = 0
        add_V4[is_on, 0], add_V4[is_on, 1] = value_V[is_on] + 1, NUM_PITCHES
        keep_V4[is_off, 1] = 0
        add_V4[is_off, 1] = value_V[is_off] + 1
        keep_V4[kind_V == VELOCITY, 2] = 0
        add_V4[kind_V == VELOCITY, 2] = value_V[kind_V == VELOCITY]
        note_V3 = np.stack([kind_V, np.where(is_on | is_off, value_V, NUM_PITCHES), is_on], axis=1)
        made = (torch.as_tensor(table, device=self.device) for table in (keep_V4, add_V4, note_V3))
        return tuple(made)  # type: ignore[return-value]

    def begin(self, ids: Sequence[int], num_lanes: int, first_tick: int = 0) -> None:
        """See `Grammar.begin`; what the tokens before the last tick leave behind is found at once.

        A lane's state: the least pitch that may begin in this tick, and that may end; the velocity; the tick. Which
        pitches sound, with one more place behind them that means nothing; the kind of the last token.
        """
        ids_N = np.asarray(ids, np.int64)
        kinds, values = self.kinds[ids_N], self.values[ids_N]
        shifts = np.flatnonzero((kinds == WHOLE) | (kinds == REST))
        before = int(shifts[-1]) if len(shifts) else 0
        notes = np.flatnonzero((kinds[:before] == NOTE_ON) | (kinds[:before] == NOTE_OFF))
        sounding = np.zeros(NUM_PITCHES + 1, bool)
        sounding[values[notes]] = kinds[notes] == NOTE_ON
        velocities = values[:before][kinds[:before] == VELOCITY]
        state = [0, 0, int(velocities[-1]) if len(velocities) else -1, int(values[shifts[:-1]].sum())]
        self.sounding_BQ = torch.from_numpy(sounding).to(self.device).repeat(num_lanes, 1)
        self.state_B4 = torch.tensor(state, device=self.device).repeat(num_lanes, 1)
        self.last_B = torch.full((num_lanes,), FREE, device=self.device)
        self.special_B4 = torch.zeros(num_lanes, len(SPECIAL_TOKENS), dtype=torch.bool, device=self.device)
        self.shift_BN = torch.ones(num_lanes, self.num_shifts, dtype=torch.bool, device=self.device)
        self.first_tick, self.is_waiting = first_tick, True
        self.onset_BQ = torch.full((num_lanes, NUM_PITCHES + 1), state[3], device=self.device)
        for id_ in ids_N[before:]:
            self.advance(torch.full((num_lanes,), int(id_), device=self.device))

    @property
    def tick_B(self) -> Tensor:  # type: ignore[override]
        """Time of each lane."""
        return self.state_B4[:, 3]

    def sounding(self, lane: int) -> list[int]:
        """Pitches that sound."""
        found: list[int] = self.sounding_BQ[lane, :NUM_PITCHES].nonzero()[:, 0].tolist()
        return found

    def allowed(self, *, may_end: bool) -> Tensor:
        """See `Grammar.allowed`."""
        state_B41 = self.state_B4[:, :, None]
        # of each pitch, whether its note may begin, and end
        is_right_B2P = self.sounding_BQ[:, None, :NUM_PITCHES] == self.is_off_2[:, None]
        pitch_B2P = is_right_B2P & (self.pitch_P >= state_B41[:, :2])
        velocity_B1 = state_B41[:, 2]
        velocity_BN = (self.velocity_N != velocity_B1) & pitch_B2P[:, 0].any(dim=-1, keepdim=True)
        pitch_B2P[:, 0] &= velocity_B1 >= 0
        if may_end:  # where nothing sounds
            self.special_B4[:, EOS] = ~self.sounding_BQ[:, :NUM_PITCHES].any(dim=-1)
        parts = [self.special_B4, pitch_B2P.flatten(1), velocity_BN, self.shift_BN]
        allowed_BV = torch.cat(parts, dim=1)
        allowed_BV &= self.after_KV.index_select(0, self.last_B)
        if self.is_waiting:
            wait_B1 = self.first_tick - state_B41[:, 3]
            self.is_waiting = bool((wait_B1 > 0).any())
            allowed_BV[:, : -self.num_shifts] &= wait_B1 <= 0
            allowed_BV[:, -self.num_shifts :] &= (self.length_N >= wait_B1) | (self.length_N == self.num_shifts)
        if self.max_note_ticks is None:
            return allowed_BV
        return self._without_long_notes(allowed_BV, self.max_note_ticks)

    def _without_long_notes(self, allowed_BV: Tensor, max_ticks: int) -> Tensor:
        """Where notes have sounded long enough, nothing but the end of the lowest of them."""
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
        self.sounding_BQ.scatter_(1, note_B3[:, 1:2], note_B3[:, 2:].bool())
        self.last_B = note_B3[:, 0]
        if self.max_note_ticks is not None:
            is_on_B1, place_B1 = note_B3[:, 2:] > 0, note_B3[:, 1:2]
            onset_B1 = torch.where(is_on_B1, self.state_B4[:, 3:], self.onset_BQ.gather(1, place_B1))
            self.onset_BQ.scatter_(1, place_B1, onset_B1)


class TypeGrammar(Grammar):
    """For any other tokenizer: which types of tokens may follow which, as MidiTok's own graph has it.

    What is drawn can be decoded; that encoding it again gives the same tokens is not promised. Where a tokenizer has
    no graph, any token may follow any other. A piece of MMM is one track, from its start to its end.

    Args:
        tokenizer: whose ids these are.
        device: where the state lies.
    """

    def __init__(self, tokenizer: MusicTokenizer, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        names = {id_: name.split("_")[0] for name, id_ in tokenizer.vocab.items()}
        followers = types_graph(tokenizer)
        size = len(tokenizer)
        self.allowed_VV = torch.zeros(size, size, dtype=torch.bool)
        for last, kind in names.items():
            for id_, follower in names.items():
                self.allowed_VV[last, id_] = id_ >= len(SPECIAL_TOKENS) and follower in followers.get(kind, set())
        ends = note_ends(names)
        if ends:  # a piece begins with what may follow a note, or with what holds for all of it
            self.allowed_VV[BOS] = self.allowed_VV[ends[0]]
            self.allowed_VV[BOS, ids_of(names, GLOBAL_TYPES)] = True
            if not tokenizer.config.one_token_stream_for_programs:  # a track begins with its program
                self.allowed_VV[ids_of(names, ("Program",))] |= self.allowed_VV[BOS]
        self.allowed_VV[~self.allowed_VV.any(dim=-1), len(SPECIAL_TOKENS) :] = True
        late = ids_of(names, LATE_TYPES)
        self.endings = [EOS]  # what is forbidden where a piece may not end
        if TRACK_END in tokenizer.vocab:
            start, end = tokenizer.vocab[TRACK_START], tokenizer.vocab[TRACK_END]
            self.endings = [EOS, end]
            self.allowed_VV[:, [start, end]] = False
            self.allowed_VV[start] = self.allowed_VV[BOS]
            self.allowed_VV[[BOS, end]] = False
            self.allowed_VV[BOS, start] = True
            self.allowed_VV[ends + late, end] = True
            ends, late = [end], []
        self.allowed_VV[ends + late, EOS] = True
        self.allowed_VV[[PAD, EOS]] = False
        self.allowed_VV[[PAD, EOS], PAD] = True
        self.allowed_VV = self.allowed_VV.to(self.device)

    def begin(self, ids: Sequence[int], num_lanes: int, first_tick: int = 0) -> None:
        """See `Grammar.begin`; these tokens tell no time."""
        self.tick_B = torch.zeros(num_lanes, dtype=torch.long, device=self.device)
        self.last_B = torch.full((num_lanes,), int(ids[-1]), device=self.device)

    def allowed(self, *, may_end: bool) -> Tensor:
        """See `Grammar.allowed`."""
        allowed_BV = self.allowed_VV[self.last_B]
        if not may_end:
            allowed_BV[:, self.endings] = False
        return allowed_BV

    def advance(self, tokens_B: Tensor) -> None:
        """See `Grammar.advance`."""
        self.last_B = tokens_B


def types_graph(tokenizer: MusicTokenizer) -> dict[str, set[str]]:
    """Which types of tokens may follow each type; MidiTok's own graph, and one for PerTok, whose graph is empty."""
    if not isinstance(tokenizer, PerTok):
        graph = tokenizer.tokens_types_graph.items()
        return {kind: {name.split("_")[0] for name in after} for kind, after in graph}
    kinds = {name.split("_")[0] for name in tokenizer.vocab} - set(SPECIAL_TOKENS)
    note = [kind for kind in ("Pitch", "MicroTiming", "Velocity", "Duration") if kind in kinds]
    free = {*(kinds - set(note)), "Pitch"}
    return dict.fromkeys(free, free) | {kind: {after} for kind, after in pairwise(note)} | {note[-1]: free}


def note_ends(kinds: dict[int, str]) -> list[int]:
    """Ids of the type that a note's tokens end with, given the type of every id."""
    candidates = (ids_of(kinds, last) for last in (("Duration", "NoteOff"), ("Velocity",), NOTE_ON_TYPES))
    return next(filter(None, candidates), [])


def ids_of(kinds: dict[int, str], wanted: Sequence[str]) -> list[int]:
    """Ids of some types."""
    return [id_ for id_, kind in kinds.items() if kind in wanted]


def grammar_of(
    tokenizer: MusicTokenizer, device: torch.device | str = "cpu", max_note_seconds: float | None = None
) -> Grammar:
    """The grammar of a tokenizer's tokens; other notes than those of `performance` have their length in a token.

    Raises:
        UserError: notes of no length.
    """
    if max_note_seconds is not None and not max_note_seconds >= 0.01:
        raise UserError(f"max_note_seconds is {max_note_seconds}; it must be at least 0.01, a tick")
    if isinstance(tokenizer, Performance):
        ticks = None if max_note_seconds is None else round(max_note_seconds * TICKS_PER_SECOND)
        return PerformanceGrammar(tokenizer, device, ticks)
    return TypeGrammar(tokenizer, device)
