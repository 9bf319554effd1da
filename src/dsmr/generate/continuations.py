"""Several continuations of one prompt, of a given length, as MIDI scores."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from symusic import Score

from dsmr.data.tokenizer import EOS, PAD, TICKS_PER_SECOND, Performance, decode
from dsmr.generate.generator import Generator
from dsmr.generate.music import closed, compose
from dsmr.generate.prompt import NOTHING, Prompt

MAX_TOKENS_PER_SECOND = 400
"""Ten times what MAESTRO has: a model that hardly writes time is stopped there."""
CHECK_EVERY = 64
"""Tokens between two looks at the music's length."""


@dataclass(frozen=True)
class Continuation:
    """New music after a prompt.

    Attributes:
        ids: the new tokens, those included that end what sounds at the end.
        score: prompt and new music.
        seconds: of new music.
        has_ended: whether the model ended the piece (EOS).
        was_stopped: whether it wrote far too many tokens for its time.
    """

    ids: list[int] = field(repr=False)
    score: "Score" = field(repr=False)
    seconds: float
    has_ended: bool
    was_stopped: bool


def continuations(
    generator: Generator,
    prompt: Prompt = NOTHING,
    *,
    seconds: float,
    num: int = 1,
    seed: int = 0,
    until_end: bool = False,
    progress: Callable[[float], None] | None = None,
) -> list[Continuation]:
    """Continue a prompt `num` times at once.

    Args:
        generator: network, tokenizer and sampling.
        prompt: what is continued; nothing begins a piece.
        seconds: of new music; with `until_end` the most.
        num: continuations; the k-th is what a single one with the seed `seed + k` gives.
        seed: of the first one's draws.
        until_end: whether the model may end the piece.
        progress: called now and then with the seconds of music that all of them have together.

    Raises:
        ValueError: no seconds, or no continuations.
    """
    last_tick = prompt.last_tick(seconds)
    is_performance = isinstance(generator.tokenizer, Performance)
    grammar = generator.grammar()
    steps = generator.tokens(prompt, num=num, seed=seed, may_end=until_end, grammar=grammar)
    lanes: list[list[int]] = [[] for _ in range(num)]
    most = round(MAX_TOKENS_PER_SECOND * seconds) + CHECK_EVERY
    for step, tokens in enumerate(islice(steps, most), start=1):
        for lane, token in zip(lanes, tokens, strict=True):
            if token != PAD:
                lane.append(token)
        if step % CHECK_EVERY == 0:
            ends = [EOS in lane[-1:] for lane in lanes]
            reached = grammar.tick_B.tolist() if is_performance else [_beats(generator, prompt, ids) for ids in lanes]
            if progress:
                progress(sum(min(tick, last_tick) - prompt.first_tick for tick in reached) / TICKS_PER_SECOND)
            if all(tick >= last_tick or is_over for tick, is_over in zip(reached, ends, strict=True)):
                break
    reached = grammar.tick_B.tolist() if is_performance else [_beats(generator, prompt, ids) for ids in lanes]
    return [
        _finished(generator, prompt, ids, last_tick, was_stopped=tick < last_tick and ids[-1] != EOS, tick=tick)
        for ids, tick in zip(lanes, reached, strict=True)
    ]


def _beats(generator: Generator, prompt: Prompt, ids: list[int]) -> int:
    """Ticks of 10 ms of the new music, where tokens tell no time: the seam is at 0."""
    score = decode(generator.tokenizer, [*prompt.ids[1:], *ids])
    return round((float(score.to("second").end()) - prompt.seam) * TICKS_PER_SECOND)


def _finished(
    generator: Generator, prompt: Prompt, ids: list[int], last_tick: int, *, was_stopped: bool, tick: int
) -> Continuation:
    last_tick = tick + 1 if was_stopped else last_tick
    if isinstance(generator.tokenizer, Performance):
        ids = closed(generator.tokenizer, prompt, ids, last_tick)
    score = compose(generator.tokenizer, prompt, ids)
    seconds = max(float(score.to("second").end()) - prompt.seam, 0.0)
    return Continuation(ids, score, seconds, EOS in ids[-1:], was_stopped)
