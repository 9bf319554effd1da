"""Music token by token from a trained network, at constant memory. B lanes, T segment, V vocabulary."""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from miditok import MusicTokenizer
from symusic import Score
from torch import Tensor

from dsmr import UserError
from dsmr.attention.backends import Backend
from dsmr.data.tokenizer import BOS, EOS, PAD, TICKS_PER_SECOND, Performance, TokenizerSpec, build_tokenizer
from dsmr.generate.grammar import NOTE_OFF, NOTE_ON, VELOCITY, Grammar, PerformanceGrammar, grammar_of
from dsmr.generate.prompt import NOTHING, Prompt, read_prompt
from dsmr.generate.sampling import Sampling, draw
from dsmr.model import Backbone
from dsmr.model.memory import Memory, map_lanes
from dsmr.share.loading import load_model

DRAWN_AT_ONCE = 256  # random numbers of a lane
MOST_SEED = 2**63 - 1


class Event(NamedTuple):
    """A key that goes down or up.

    Attributes:
        seconds: since the piece's beginning.
        pitch: MIDI's, 0-127.
        velocity: 1-127; 0 where the note ends.
    """

    seconds: float
    pitch: int
    velocity: int


class Generator:
    """Continues pieces; holds a network and its tokenizer, and no state of any piece.

    Args:
        backbone: in evaluation mode.
        tokenizer: of its tokens.
        sampling: how tokens are drawn.
        max_note_seconds: notes of `performance` tokens are ended after so long; None leaves it to the network.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: MusicTokenizer,
        sampling: Sampling | None = None,
        max_note_seconds: float | None = None,
    ) -> None:
        self.backbone, self.tokenizer, self.sampling = backbone, tokenizer, sampling or Sampling()
        self.max_note_seconds = max_note_seconds
        self.grammar()

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        horizons: str | None = None,
        sampling: Sampling | None = None,
        max_note_seconds: float | None = None,
        device: torch.device | str = "cpu",
        attention: Backend = "auto",
    ) -> "Generator":
        """Generator of a run (its best), a checkpoint file or an exported folder.

        Args:
            checkpoint: where it is.
            horizons: others than the trained ones; None keeps those.
            sampling: how tokens are drawn.
            max_note_seconds: after which notes are ended; None leaves it to the network.
            device: where the network runs.
            attention: see `dsmr.attention.backends.attend`. On CUDA, `auto` compiles its kernels at the first prompt,
                once for all prompts; `materialised` compiles nothing.

        Raises:
            UserError: there is none, it names no tokenizer, or the tokenizer has another vocabulary.
        """
        loaded = load_model(checkpoint, horizons=horizons, attention=attention)
        if loaded.tokenizer is None:
            raise UserError(f"{loaded.path} names no tokenizer; train with dsmr fit")
        tokenizer = build_tokenizer(TokenizerSpec(**loaded.tokenizer))
        is_other = loaded.vocabulary is not None and loaded.vocabulary != dict(tokenizer.vocab)
        if is_other or len(tokenizer) != loaded.backbone.vocab_size:
            raise UserError(
                f"{loaded.path}: the network was trained on {loaded.backbone.vocab_size} tokens, the tokenizer "
                f"{loaded.tokenizer['name']} here has {len(tokenizer)}{' others' if is_other else ''}; use the "
                "version of dsmr and MidiTok that trained it"
            )
        return cls(loaded.backbone.to(device), tokenizer, sampling, max_note_seconds)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return next(self.backbone.parameters()).device

    def prompt(self, file: "str | Path | Score", seconds: float | None = None) -> Prompt:
        """The beginning of a MIDI file, or all of it; see `dsmr.generate.prompt.read_prompt`."""
        return read_prompt(self.tokenizer, file, seconds)

    def stream(
        self, prompt: "Prompt | str | Path | Score | None" = None, *, seconds: float | None = None, seed: int = 0
    ) -> Iterator[Event]:
        """Notes as they come, for playing them at once; without end but where the piece ends.

        Args:
            prompt: what is continued: a MIDI file, a score, or a part of one as of `prompt`; None begins a piece.
            seconds: of music, after which sounding notes are ended; None leaves the end to the model.
            seed: of the draws.

        Raises:
            UserError: the prompt cannot be used, no music is asked for, or the tokens are not `performance`.
        """
        if not isinstance(self.tokenizer, Performance):
            raise UserError("notes can be streamed from performance tokens only; use tokens() and decode them")
        begun = prompt if isinstance(prompt, Prompt) else NOTHING if prompt is None else self.prompt(prompt)
        return self._stream(begun, seconds, seed)

    def _stream(self, prompt: Prompt, seconds: float | None, seed: int) -> Iterator[Event]:
        grammar = self.grammar()
        assert isinstance(grammar, PerformanceGrammar)
        last = None if seconds is None else prompt.last_tick(seconds)
        grammar.begin(prompt.ids, 1)
        kinds, values = grammar.kinds.tolist(), grammar.values.tolist()
        velocity = max(int(grammar.state_B4[0, 2]), 0)
        for (token,) in self.tokens(prompt, seed=seed, may_end=last is None, grammar=grammar):
            tick = int(grammar.tick_B)
            if last is not None and tick >= last:
                for pitch in grammar.sounding(0):
                    yield Event(last / TICKS_PER_SECOND, pitch, 0)
                return
            kind, value = kinds[token], values[token]
            if kind == VELOCITY:
                velocity = value
            elif kind in (NOTE_ON, NOTE_OFF):
                loudness = int(self.tokenizer.velocities[velocity]) if kind == NOTE_ON else 0
                yield Event(tick / TICKS_PER_SECOND, value, loudness)

    def tokens(
        self,
        prompt: Prompt | Sequence[int] = (BOS,),
        *,
        num: int = 1,
        seed: int = 0,
        may_end: bool = True,
        grammar: Grammar | None = None,
    ) -> Iterator[list[int]]:
        """New tokens of all continuations, step by step; a lane that has ended gives PAD.

        The prompt is read once, in whole segments, at the speed of training; then every lane goes its own way.
        Lane k draws as a single one with the seed `seed + k` would.

        Args:
            prompt: what all lanes have read, or its ids, BOS first.
            num: B, continuations.
            seed: of the first lane's draws.
            may_end: whether the model may end a piece.
            grammar: whose state the caller wants to see: that after the tokens that were given.

        Raises:
            UserError: an empty prompt, or no lanes.
        """
        given = prompt if isinstance(prompt, Prompt) else Prompt(list(prompt))
        if not given.ids or num < 1:
            raise UserError(f"{num} continuations of {len(given.ids)} tokens: there must be one of each at least")
        return self._tokens(given, num, seed, may_end, self.grammar() if grammar is None else grammar)

    def grammar(self) -> Grammar:
        """What may follow, for lanes that have not begun yet."""
        return grammar_of(self.tokenizer, self.device, self.max_note_seconds)

    def _tokens(self, prompt: Prompt, num: int, seed: int, may_end: bool, grammar: Grammar) -> Iterator[list[int]]:
        with torch.inference_mode():
            logits_BV, memory = self.read(prompt.ids, num)
            grammar.begin(prompt.ids, num, prompt.first_tick)
        draws, has_ended_B = Draws(seed, num, self.device), torch.zeros(num, dtype=torch.bool, device=self.device)
        while True:
            with torch.inference_mode():
                allowed_BV = grammar.allowed(may_end=may_end)
                drawn_B = draw(logits_BV, allowed_BV, draws.next(), self.sampling, grammar.kinds_VK)
                if may_end:
                    drawn_B = drawn_B.masked_fill(has_ended_B, PAD)
                    has_ended_B = has_ended_B | (drawn_B == EOS)
                grammar.advance(drawn_B)
            yield drawn_B.tolist()
            if may_end and bool(has_ended_B.all()):
                return
            with torch.inference_mode():
                logits_BTV, update = self.backbone(drawn_B[:, None], memory)
                memory.commit(update)
                logits_BV = logits_BTV[:, -1]

    def read(self, ids: Sequence[int], num_lanes: int = 1) -> tuple[Tensor, Memory]:
        """Read a prompt segment by segment; give the logits (B, V) after it, and the memory of so many lanes of it.

        Where each length of a pass is compiled anew, the last segment is padded to T tokens, of which only the
        prompt's are committed. Every pass then has the same shape; attention is causal, so padding changes no logits.
        """
        memory = self.backbone.init_memory(1, decoding=True)
        segment = self.backbone.segment_length
        pads = self.backbone.compiles_each_length
        for first in range(0, len(ids), segment):
            part = list(ids[first : first + segment])
            # a single token is read as in decoding, which compiles nothing
            missing = segment - len(part) if pads and len(part) > 1 else 0
            logits_BTV, update = self.backbone(torch.tensor([part + [PAD] * missing], device=self.device), memory)
            memory.commit(update.first(len(part)) if missing else update)
            logits_BV = logits_BTV[:, len(part) - 1]
        if num_lanes == 1:
            return logits_BV, memory
        wide = self.backbone.init_memory(num_lanes, decoding=True)
        wide.load_state_dict(map_lanes(memory.state_dict(), lambda one: one.expand(num_lanes, *one.shape[1:])))
        return logits_BV.repeat(num_lanes, 1), wide


def check_seed(option: str, seed: int, num_lanes: int) -> None:
    """Refuse a seed that torch does not take.

    Raises:
        UserError: naming the option.
    """
    if abs(seed) + num_lanes > MOST_SEED:
        raise UserError(f"{option} is {seed}; it must be from 0 to {MOST_SEED - num_lanes}")


class Draws:
    """Uniform random numbers in [0, 1), (B, 1) at a time; lane k has a generator of its own, seeded `seed + k`."""

    def __init__(self, seed: int, num_lanes: int, device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed + lane) for lane in range(num_lanes)]
        self.device = device
        self._numbers = self._steps()

    def next(self) -> Tensor:
        """Those of the next step."""
        return next(self._numbers)

    def _steps(self) -> Iterator[Tensor]:
        for _ in count():
            rows = [torch.rand(DRAWN_AT_ONCE, generator=generator) for generator in self.generators]
            yield from torch.stack(rows, dim=-1).to(self.device)[:, :, None]
