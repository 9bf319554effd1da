"""Grammars: masks of the tokens that may come next, so that everything that is sampled can be decoded to music.

B lanes, V vocabulary, K kinds of tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Container, Sequence
from itertools import pairwise

import torch
from miditok import MusicTokenizer, PerTok
from torch import Tensor

from dsmr.data.tokenizer import TRACK_END, TRACK_START
from dsmr.data.vocabulary import BOS, EOS, NOTE_ON_TYPES, PAD, SPECIAL_TOKENS, token_type

GLOBAL_TYPES = ("TimeSig", "Tempo", "KeySig", "Program")
"""MidiTok's types that may come before the first note."""
LATE_TYPES = ("PedalOff", "ControlChange", "PitchBend")
"""MidiTok's types that may come after the last note."""


class Grammar(ABC):
    """State of all lanes, from which the tokens that may come next follow."""

    tick_B: Tensor  # time of each lane in the tokenizer's ticks, if its tokens tell the time; otherwise 0
    kinds_VK: Tensor | None = None  # 1 where a token is of a kind, see `sampling.normalize_within_kinds`

    @abstractmethod
    def begin(self, ids: Sequence[int], num_lanes: int, first_tick: int = 0) -> None:
        """Set the state of all lanes to that after `ids`, BOS first; no event may come before `first_tick`."""

    @abstractmethod
    def allowed(self, *, may_end: bool) -> Tensor:
        """Mask of the tokens that may come next, bool (B, V), at least one per lane; EOS only if `may_end`."""

    @abstractmethod
    def advance(self, tokens_B: Tensor) -> None:
        """Update the state with one token per lane; lanes that have ended get PAD."""


class TypeGrammar(Grammar):
    """The grammar of any other tokenizer: which types may follow which, from MidiTok's own graph of types.

    Everything that is sampled can be decoded, but encoding it again may yield other tokens. For a tokenizer without a
    graph, any token may follow any other. A piece of MMM is a single track, from its start token to its end token.
    """

    def __init__(self, tokenizer: MusicTokenizer, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        types = {id_: token_type(name) for name, id_ in tokenizer.vocab.items()}
        followers = type_graph(tokenizer)
        size = len(tokenizer)
        self.allowed_VV = torch.zeros(size, size, dtype=torch.bool)  # row: the last token, column: the next
        for last, kind in types.items():
            self.allowed_VV[last, ids_of_types(types, followers.get(kind, ()))] = True
        self.allowed_VV[:, : len(SPECIAL_TOKENS)] = False
        kinds_of_ends = (("Duration", "NoteOff"), ("Velocity",), NOTE_ON_TYPES)  # what ends a note: the first there is
        ends = next((ids for kinds in kinds_of_ends if (ids := ids_of_types(types, kinds))), [])
        if ends:  # a piece may start with what may follow a note, or with what applies to the whole piece
            self.allowed_VV[BOS] = self.allowed_VV[ends[0]]
            self.allowed_VV[BOS, ids_of_types(types, GLOBAL_TYPES)] = True
            if not tokenizer.config.one_token_stream_for_programs:  # a track starts with its program
                self.allowed_VV[ids_of_types(types, ("Program",))] |= self.allowed_VV[BOS]
        self.allowed_VV[~self.allowed_VV.any(dim=-1), len(SPECIAL_TOKENS) :] = True  # no row may be empty
        late = ids_of_types(types, LATE_TYPES)
        self.endings = [EOS]  # forbidden if a piece may not end
        if TRACK_END in tokenizer.vocab:
            start, end = tokenizer.vocab[TRACK_START], tokenizer.vocab[TRACK_END]
            self.endings = [EOS, end]
            self.allowed_VV[:, [start, end]] = False
            self.allowed_VV[start] = self.allowed_VV[BOS]
            self.allowed_VV[[BOS, end]] = False
            self.allowed_VV[BOS, start] = True
            self.allowed_VV[ends + late, end] = True
            ends, late = [end], []  # only the end of the track ends the piece
        self.allowed_VV[ends + late, EOS] = True
        self.allowed_VV[[PAD, EOS]] = False
        self.allowed_VV[[PAD, EOS], PAD] = True  # lanes that have ended wait for the others
        self.allowed_VV = self.allowed_VV.to(self.device)

    def begin(self, ids: Sequence[int], num_lanes: int, first_tick: int = 0) -> None:
        """See `Grammar.begin`; these tokens do not tell the time."""
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


def type_graph(tokenizer: MusicTokenizer) -> dict[str, set[str]]:
    """Return the types that may follow each type: MidiTok's graph, and our own for PerTok, whose graph is empty."""
    if not isinstance(tokenizer, PerTok):
        return {kind: {token_type(name) for name in after} for kind, after in tokenizer.tokens_types_graph.items()}
    types = {token_type(name) for name in tokenizer.vocab} - set(SPECIAL_TOKENS)
    note = [kind for kind in ("Pitch", "MicroTiming", "Velocity", "Duration") if kind in types]
    free = {*(types - set(note)), "Pitch"}
    return dict.fromkeys(free, free) | {kind: {after} for kind, after in pairwise(note)} | {note[-1]: free}


def ids_of_types(types: dict[int, str], wanted: Container[str]) -> list[int]:
    """Return the ids of some types."""
    return [id_ for id_, kind in types.items() if kind in wanted]
