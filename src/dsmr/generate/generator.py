"""Generate music token by token at constant memory. B lanes, T segment length, V vocabulary."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from miditok import MusicTokenizer
from symusic import Score
from torch import Tensor

from dsmr import UserError
from dsmr.attention.backends import Backend
from dsmr.data.performance import TICKS_PER_SECOND, Performance
from dsmr.data.tokenizer import TokenizerSpec, build_tokenizer
from dsmr.data.vocabulary import BOS, EOS, PAD
from dsmr.generate.grammar import Grammar, TypeGrammar
from dsmr.generate.performance_grammar import NOTE_OFF, NOTE_ON, VELOCITY, PerformanceGrammar
from dsmr.generate.prompt import EMPTY_PROMPT, Prompt, read_prompt
from dsmr.generate.sampling import Sampling, sample_tokens
from dsmr.model import Backbone
from dsmr.model.memory import Memory, map_lanes
from dsmr.share.loading import load_model

NUMBERS_PER_BLOCK = 256
MAX_SEED = 2**63 - 1


class Event(NamedTuple):
    """The start or end of a note."""

    seconds: float  # since the start of the piece
    pitch: int  # MIDI pitch, 0-127
    velocity: int  # 1-127 at the start, 0 at the end


class Generator:
    """Continues pieces with a network and its tokenizer; keeps no state between calls.

    Args:
        backbone: the network, in evaluation mode.
        tokenizer: the tokenizer that it was trained with.
        sampling: settings of sampling.
        max_note_seconds: longest duration of a note, for `performance` tokens; None leaves it to the network.
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
        self.grammar()  # refuses a bad max_note_seconds before anything is generated

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
        """Load a run (its best checkpoint), a checkpoint file or an exported folder; `horizons` replace the trained.

        For `attention` see `dsmr.attention.backends.attend`. On CUDA, `auto` compiles its kernels at the first prompt,
        once for all prompts; `materialised` compiles nothing.
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
        """Device of the network."""
        return next(self.backbone.parameters()).device

    def prompt(self, file: "str | Path | Score", seconds: float | None = None) -> Prompt:
        """Read the first `seconds` of a MIDI file, or all of it; see `dsmr.generate.prompt.read_prompt`."""
        return read_prompt(self.tokenizer, file, seconds)

    def stream(
        self, prompt: "Prompt | str | Path | Score | None" = None, *, seconds: float | None = None, seed: int = 0
    ) -> Iterator[Event]:
        """Yield notes as they are generated, until `seconds` are over or the model ends the piece.

        Args:
            prompt: a MIDI file, a score, or a `Prompt` to continue; None starts a new piece.
            seconds: seconds of new music, after which sounding notes are ended; None lets the model end the piece.
            seed: random seed.

        Raises:
            UserError: the prompt cannot be used, `seconds` is not positive, or the tokens are not `performance`.
        """
        if not isinstance(self.tokenizer, Performance):
            raise UserError("notes can be streamed from performance tokens only; use tokens() and decode them")
        given = prompt if isinstance(prompt, Prompt) else EMPTY_PROMPT if prompt is None else self.prompt(prompt)
        return self._stream(given, seconds, seed)

    def _stream(self, prompt: Prompt, seconds: float | None, seed: int) -> Iterator[Event]:
        grammar = self.grammar()
        assert isinstance(grammar, PerformanceGrammar)
        last = None if seconds is None else prompt.last_tick(seconds)
        grammar.begin(prompt.ids, 1)  # for the velocity in force at the seam; `tokens` begins again
        kinds, values = grammar.kinds.tolist(), grammar.values.tolist()
        velocity = max(int(grammar.state_B4[0, 2]), 0)
        for (token,) in self.tokens(prompt, seed=seed, may_end=last is None, grammar=grammar):
            tick = int(grammar.tick_B)  # after this token
            if last is not None and tick >= last:  # its shift reaches or passes the end
                for pitch in grammar.sounding(0):
                    yield Event(last / TICKS_PER_SECOND, pitch, 0)
                return
            if kinds[token] == VELOCITY:
                velocity = values[token]
            elif kinds[token] in (NOTE_ON, NOTE_OFF):
                loudness = int(self.tokenizer.velocities[velocity]) if kinds[token] == NOTE_ON else 0
                yield Event(tick / TICKS_PER_SECOND, values[token], loudness)

    def tokens(
        self,
        prompt: Prompt | Sequence[int] = (BOS,),
        *,
        num: int = 1,
        seed: int = 0,
        may_end: bool = True,
        grammar: Grammar | None = None,
    ) -> Iterator[list[int]]:
        """Yield the new tokens of all lanes, step by step; PAD for lanes that have ended.

        The prompt is read once, in whole segments, at the speed of training, and its memory is then copied to all
        lanes. Lane k yields the same tokens as a single lane with seed `seed + k`.

        Args:
            prompt: a `Prompt`, or its ids, BOS first.
            num: number of lanes (B).
            seed: random seed of the first lane.
            may_end: True lets the model end a piece.
            grammar: a grammar of the caller, to watch its state: that after the tokens that were yielded last.
        """
        given = prompt if isinstance(prompt, Prompt) else Prompt(list(prompt))
        if not given.ids or num < 1:
            raise UserError(f"{num} continuations of {len(given.ids)} tokens: there must be one of each at least")
        return self._tokens(given, num, seed, may_end, self.grammar() if grammar is None else grammar)

    def grammar(self) -> Grammar:
        """Make a grammar for the tokenizer, without any lanes yet."""
        return make_grammar(self.tokenizer, self.device, self.max_note_seconds)

    def _tokens(self, prompt: Prompt, num: int, seed: int, may_end: bool, grammar: Grammar) -> Iterator[list[int]]:
        with torch.inference_mode():
            logits_BV, memory = self.prefill(prompt.ids, num)
            grammar.begin(prompt.ids, num, prompt.first_tick)
        uniforms = uniform_numbers(seed, num, self.device)
        has_ended_B = torch.zeros(num, dtype=torch.bool, device=self.device)
        while True:
            with torch.inference_mode():
                allowed_BV = grammar.allowed(may_end=may_end)
                tokens_B = sample_tokens(logits_BV, allowed_BV, next(uniforms), self.sampling, grammar.kinds_VK)
                if may_end:
                    tokens_B = tokens_B.masked_fill(has_ended_B, PAD)
                    has_ended_B = has_ended_B | (tokens_B == EOS)
                grammar.advance(tokens_B)
            yield tokens_B.tolist()  # outside inference_mode, which would otherwise hold in the caller's code as well
            if may_end and bool(has_ended_B.all()):
                return
            with torch.inference_mode():
                logits_BTV, update = self.backbone(tokens_B[:, None], memory)
                memory.commit(update)
                logits_BV = logits_BTV[:, -1]

    def prefill(self, ids: Sequence[int], num_lanes: int = 1) -> tuple[Tensor, Memory]:
        """Read a prompt segment by segment; return the logits after it, (B, V), and its memory, copied to B lanes.

        If every new length of a pass is compiled first, the last segment is padded to T tokens, of which only the
        prompt's are committed to memory: all passes then share one shape. Attention is causal, so that the padding
        behind them changes no logits.
        """
        memory = self.backbone.init_memory(1, decoding=True)
        segment = self.backbone.segment_length
        pads = self.backbone.compiles_each_length
        for first in range(0, len(ids), segment):
            part = list(ids[first : first + segment])
            # a single token takes the path of decoding, which is not compiled
            missing = segment - len(part) if pads and len(part) > 1 else 0
            logits_BTV, update = self.backbone(torch.tensor([part + [PAD] * missing], device=self.device), memory)
            memory.commit(update.first(len(part)) if missing else update)
            logits_BV = logits_BTV[:, len(part) - 1]
        if num_lanes == 1:
            return logits_BV, memory
        wide = self.backbone.init_memory(num_lanes, decoding=True)
        wide.load_state_dict(map_lanes(memory.state_dict(), lambda one: one.expand(num_lanes, *one.shape[1:])))
        return logits_BV.repeat(num_lanes, 1), wide


def make_grammar(
    tokenizer: MusicTokenizer, device: torch.device | str = "cpu", max_note_seconds: float | None = None
) -> Grammar:
    """Make the grammar of a tokenizer.

    `max_note_seconds` is the longest duration of a note, for `performance` only: notes of other tokenizers have their
    duration in one token.
    """
    if max_note_seconds is not None and not max_note_seconds >= 0.01:
        raise UserError(f"max_note_seconds is {max_note_seconds}; it must be at least 0.01, one tick")
    if isinstance(tokenizer, Performance):
        ticks = None if max_note_seconds is None else round(max_note_seconds * TICKS_PER_SECOND)
        return PerformanceGrammar(tokenizer, device, ticks)
    return TypeGrammar(tokenizer, device)


def check_seed(option: str, seed: int, num_lanes: int) -> None:
    """Raise `UserError` naming the option if torch would not accept the seed."""
    if abs(seed) + num_lanes > MAX_SEED:
        raise UserError(f"{option} is {seed}; it must be from 0 to {MAX_SEED - num_lanes}")


def uniform_numbers(seed: int, num_lanes: int, device: torch.device) -> Iterator[Tensor]:
    """Yield uniform random numbers in [0, 1), (B, 1) each, without end.

    Lane k has a generator of its own, seeded `seed + k`, so that its numbers do not depend on the other lanes. Numbers
    are drawn on the CPU, where they are the same for every device, and in blocks, so that they are copied rarely.
    """
    generators = [torch.Generator().manual_seed(seed + lane) for lane in range(num_lanes)]
    while True:
        lanes = [torch.rand(NUMBERS_PER_BLOCK, generator=generator) for generator in generators]
        yield from torch.stack(lanes, dim=-1).to(device)[:, :, None]
