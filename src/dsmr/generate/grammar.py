"""Which tokens may follow, so that all that is drawn is music: nothing is dropped or changed when it is decoded.

B lanes, P = 128 pitches, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from miditok import MusicTokenizer
from torch import Tensor

from dsmr.data.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS, Performance

NUM_PITCHES = 128
FREE, WHOLE, REST, VELOCITY, NOTE_ON, NOTE_OFF = range(6)
"""What the last token was: none, a shift of a whole second, a shorter one, and so on."""


class Grammar(ABC):
    """What each lane may draw next.

    Attributes:
        tick_B: time of each lane in the tokenizer's smallest steps, where tokens tell it.
    """

    tick_B: Tensor

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
    """

    def __init__(self, tokenizer: Performance, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.note_on, self.note_off = tokenizer.note_on, tokenizer.note_off
        self.velocity, self.num_velocities = tokenizer.velocity, len(tokenizer.velocities)
        self.shift, self.num_shifts = tokenizer.shift, tokenizer.num_shifts
        self.vocab_size = len(tokenizer)
        kind_V, value_V = np.full(self.vocab_size, FREE), np.zeros(self.vocab_size, np.int64)
        for first, count, kind in (
            (self.note_on, NUM_PITCHES, NOTE_ON),
            (self.note_off, NUM_PITCHES, NOTE_OFF),
            (self.velocity, self.num_velocities, VELOCITY),
            (self.shift, self.num_shifts, REST),
        ):
            kind_V[first : first + count], value_V[first : first + count] = kind, np.arange(count)
        kind_V[self.shift + self.num_shifts - 1] = WHOLE
        value_V[self.shift : self.shift + self.num_shifts] += 1
        self._kind, self._value = kind_V, value_V
        self.kind_V = torch.as_tensor(kind_V, device=self.device)
        self.value_V = torch.as_tensor(value_V, device=self.device)
        self.pitch_P = torch.arange(NUM_PITCHES, device=self.device)
        self.velocity_N = torch.arange(self.num_velocities, device=self.device)
        self.length_N = torch.arange(1, self.num_shifts + 1, device=self.device)

    def begin(self, ids: Sequence[int], num_lanes: int, first_tick: int = 0) -> None:
        """See `Grammar.begin`; what the tokens before the last tick leave behind is found at once."""
        ids_N = np.asarray(ids, np.int64)
        kinds, values = self._kind[ids_N], self._value[ids_N]
        shifts = np.flatnonzero((kinds == WHOLE) | (kinds == REST))
        before = int(shifts[-1]) if len(shifts) else 0
        notes = np.flatnonzero((kinds[:before] == NOTE_ON) | (kinds[:before] == NOTE_OFF))
        sounding = np.zeros(NUM_PITCHES, bool)
        sounding[values[notes]] = kinds[notes] == NOTE_ON
        velocities = values[:before][kinds[:before] == VELOCITY]

        def each(value: int) -> Tensor:
            return torch.full((num_lanes,), value, dtype=torch.long, device=self.device)

        self.sounding_BP = torch.from_numpy(sounding).to(self.device).repeat(num_lanes, 1)
        self.velocity_B = each(int(velocities[-1]) if len(velocities) else -1)
        self.tick_B = each(int(values[shifts[:-1]].sum()))
        self.first_tick_B = each(first_tick)
        self.last_B, self.next_off_B, self.next_on_B = each(FREE), each(0), each(0)
        for id_ in ids_N[before:]:
            self.advance(each(int(id_)))

    def allowed(self, *, may_end: bool) -> Tensor:
        """See `Grammar.allowed`."""
        allowed_BV = torch.zeros(len(self.tick_B), self.vocab_size, dtype=torch.bool, device=self.device)
        last_B1, velocity_B1 = self.last_B[:, None], self.velocity_B[:, None]
        wait_B1 = (self.first_tick_B - self.tick_B)[:, None]
        is_due_B1, is_open_B1 = wait_B1 <= 0, last_B1 != VELOCITY
        silent_BP = ~self.sounding_BP & (self.pitch_P >= self.next_on_B[:, None]) & is_due_B1
        ends_BP = self.sounding_BP & (self.pitch_P >= self.next_off_B[:, None])
        arrives_BN = (self.length_N >= wait_B1) | (self.length_N == self.num_shifts)
        allowed_BV[:, self.note_on : self.note_on + NUM_PITCHES] = silent_BP & (velocity_B1 >= 0)
        allowed_BV[:, self.note_off : self.note_off + NUM_PITCHES] = ends_BP & is_open_B1 & is_due_B1
        allowed_BV[:, self.velocity : self.velocity + self.num_velocities] = (
            silent_BP.any(dim=-1, keepdim=True) & is_open_B1 & (self.velocity_N != velocity_B1)
        )
        allowed_BV[:, self.shift : self.shift + self.num_shifts] = arrives_BN & is_open_B1 & (last_B1 != REST)
        if may_end:
            allowed_BV[:, EOS] = (self.last_B == NOTE_OFF) & ~self.sounding_BP.any(dim=-1) & is_due_B1[:, 0]
        return allowed_BV

    def advance(self, tokens_B: Tensor) -> None:
        """See `Grammar.advance`."""
        kind_B, value_B = self.kind_V[tokens_B], self.value_V[tokens_B]
        is_on_B, is_off_B, is_shift_B = kind_B == NOTE_ON, kind_B == NOTE_OFF, (kind_B == WHOLE) | (kind_B == REST)
        pitch_B1 = torch.where(is_on_B | is_off_B, value_B, 0)[:, None]
        sounds_B1 = is_on_B[:, None] | (self.sounding_BP.gather(1, pitch_B1) & ~is_off_B[:, None])
        self.sounding_BP.scatter_(1, pitch_B1, sounds_B1)
        self.velocity_B = torch.where(kind_B == VELOCITY, value_B, self.velocity_B)
        self.tick_B = self.tick_B + value_B * is_shift_B
        after_B = value_B + 1
        next_off_B = torch.where(is_off_B, after_B, torch.where(is_on_B, NUM_PITCHES, self.next_off_B))
        next_on_B = torch.where(is_on_B, after_B, self.next_on_B)
        self.next_off_B, self.next_on_B = next_off_B * ~is_shift_B, next_on_B * ~is_shift_B
        self.last_B = kind_B


class TypeGrammar(Grammar):
    """For any other tokenizer: which types of tokens may follow which, as MidiTok's own graph has it.

    What is drawn can be decoded; that encoding it again gives the same tokens is not promised.

    Args:
        tokenizer: whose ids these are.
        device: where the state lies.
    """

    def __init__(self, tokenizer: MusicTokenizer, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        names = {id_: name.split("_")[0] for name, id_ in tokenizer.vocab.items()}
        followers = {
            kind: {name.split("_")[0] for name in after} for kind, after in tokenizer.tokens_types_graph.items()
        }
        size = len(tokenizer)
        self.allowed_VV = torch.zeros(size, size, dtype=torch.bool)
        for last, kind in names.items():
            for id_, follower in names.items():
                self.allowed_VV[last, id_] = id_ >= len(SPECIAL_TOKENS) and follower in followers.get(kind, set())
        ends = [id_ for id_, kind in names.items() if kind in ("Duration", "NoteOff")]  # of what a note is written as
        if ends:  # a piece begins with what may follow a note
            self.allowed_VV[BOS] = self.allowed_VV[ends[0]]
        self.allowed_VV[~self.allowed_VV.any(dim=-1), len(SPECIAL_TOKENS) :] = True
        self.allowed_VV[ends, EOS] = True
        self.allowed_VV[PAD, PAD] = True
        self.allowed_VV = self.allowed_VV.to(self.device)

    def begin(self, ids: Sequence[int], num_lanes: int, first_tick: int = 0) -> None:
        """See `Grammar.begin`; these tokens tell no time."""
        self.tick_B = torch.zeros(num_lanes, dtype=torch.long, device=self.device)
        self.last_B = torch.full((num_lanes,), int(ids[-1]), device=self.device)

    def allowed(self, *, may_end: bool) -> Tensor:
        """See `Grammar.allowed`."""
        allowed_BV = self.allowed_VV[self.last_B]
        if not may_end:
            allowed_BV[:, EOS] = False
        return allowed_BV

    def advance(self, tokens_B: Tensor) -> None:
        """See `Grammar.advance`."""
        self.last_B = tokens_B


def grammar_of(tokenizer: MusicTokenizer, device: torch.device | str = "cpu") -> Grammar:
    """The grammar of a tokenizer's tokens."""
    if isinstance(tokenizer, Performance):
        return PerformanceGrammar(tokenizer, device)
    return TypeGrammar(tokenizer, device)
