"""Continuations of a prompt, of a given length, as MIDI scores."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from symusic import Score

from dsmr.data.performance import TICKS_PER_SECOND, Performance
from dsmr.data.vocabulary import EOS, PAD
from dsmr.generate.generator import Generator
from dsmr.generate.grammar import Grammar
from dsmr.generate.music import NewMusic, compose_score, end_sounding_notes
from dsmr.generate.prompt import EMPTY_PROMPT, Prompt

MAX_TOKENS_PER_SECOND = 400
"""Limit for models that write hardly any time shifts; ten times the rate of MAESTRO."""
CHECK_EVERY = 64
"""Steps between two measurements of the music's length."""


@dataclass(frozen=True)
class Continuation:
    """New music after a prompt."""

    ids: list[int] = field(repr=False)  # new tokens, including those that end the notes sounding at the end
    score: "Score" = field(repr=False)  # prompt and new music
    seconds: float  # of new music
    has_ended: bool  # by the model (EOS)
    was_stopped: bool  # it wrote too many tokens for the requested time (`MAX_TOKENS_PER_SECOND`)


def continuations(
    generator: Generator,
    prompt: Prompt = EMPTY_PROMPT,
    *,
    seconds: float,
    num: int = 1,
    seed: int = 0,
    until_end: bool = False,
    progress: Callable[[float], None] | None = None,
) -> list[Continuation]:
    """Continue a prompt `num` times, as one batch.

    Args:
        generator: network, tokenizer and sampling.
        prompt: music to continue; empty to start a piece.
        seconds: of new music, rounded to ticks of 10 ms; an upper limit if `until_end`.
        num: number of continuations; the k-th equals a single one with the seed `seed + k`.
        seed: random seed of the first one.
        until_end: let the model end the piece.
        progress: called repeatedly with the seconds of new music in all continuations, from 0 to `num * seconds`.
    """
    last_tick = prompt.last_tick(seconds)
    goal = (last_tick - prompt.first_tick) / TICKS_PER_SECOND
    grammar = generator.grammar()
    steps = generator.tokens(prompt, num=num, seed=seed, may_end=until_end, grammar=grammar)
    lanes = Lanes(generator, prompt, grammar, num, goal)
    most = round(MAX_TOKENS_PER_SECOND * seconds) + CHECK_EVERY
    for step, tokens in enumerate(islice(steps, most), start=1):
        lanes.append(tokens)
        if step % CHECK_EVERY == 0:
            lanes.measure(progress)
            if lanes.are_over:
                break
    lanes.measure(progress)
    return [_finished(generator, prompt, lanes, lane, last_tick) for lane in range(num)]


class Lanes:
    """New tokens of all continuations, and the seconds of new music that each has.

    `grammar` tracks the time of `performance` tokens; the music of others is decoded. `goal` is in seconds.
    """

    def __init__(self, generator: Generator, prompt: Prompt, grammar: Grammar, num: int, goal: float) -> None:
        self.prompt, self.grammar, self.goal = prompt, grammar, goal
        self.ids: list[list[int]] = [[] for _ in range(num)]
        self.reached = [0.0] * num
        self.music = None if isinstance(generator.tokenizer, Performance) else NewMusic(generator.tokenizer, prompt)
        self._window = [(0, 0)] * num  # lengths of `ids` at the last two measurements

    def append(self, tokens: list[int]) -> None:
        """Append the tokens of a step; lanes that have ended have PAD."""
        for ids, token in zip(self.ids, tokens, strict=True):
            if token != PAD:
                ids.append(token)

    def measure(self, progress: Callable[[float], None] | None) -> None:
        """Update the seconds of new music in each lane, from 0 to the goal, and report those of all lanes together."""
        if self.music is None:
            found = (self.grammar.tick_B - self.prompt.first_tick).tolist()
            self.reached = [min(max(ticks / TICKS_PER_SECOND, 0.0), self.goal) for ticks in found]
        else:
            for lane, ids in enumerate(self.ids):
                if self.reached[lane] < self.goal:
                    self.reached[lane] = min(self.music.reached(ids), self.goal)
                    self._window[lane] = (self._window[lane][1], len(ids))
        if progress:
            progress(min(sum(self.reached), self.goal * len(self.ids)))

    @property
    def are_over(self) -> bool:
        """True if every lane has reached the goal or ended its piece."""
        return all(s >= self.goal or EOS in ids[-1:] for s, ids in zip(self.reached, self.ids, strict=True))

    def cut(self, lane: int) -> list[int]:
        """Tokens of a lane up to the one that reaches the goal, so that they do not depend on other lanes.

        `performance` tokens are cut to the tick by `end_sounding_notes` instead.
        """
        ids = self.ids[lane]
        if self.music is None or self.reached[lane] < self.goal:
            return ids
        low, high = self._window[lane]  # before the goal, and at it or beyond
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.music.reached(ids[:middle]) >= self.goal else (middle, high)
        return ids[:high]


def _finished(generator: Generator, prompt: Prompt, lanes: Lanes, lane: int, last_tick: int) -> Continuation:
    tokenizer, ids, reached, goal = generator.tokenizer, lanes.cut(lane), lanes.reached[lane], lanes.goal
    was_stopped = reached < goal and EOS not in ids[-1:]
    if isinstance(tokenizer, Performance):
        tick = prompt.first_tick + round(reached * TICKS_PER_SECOND)
        ids = end_sounding_notes(tokenizer, prompt, ids, tick + 1 if was_stopped else last_tick)
        score = compose_score(tokenizer, prompt, ids)
        seconds = max(float(score.to("second").end()) - prompt.seam, 0.0)
    else:
        score = compose_score(tokenizer, prompt, ids, goal)
        seconds = NewMusic(tokenizer, prompt).end(ids, goal)
    return Continuation(ids, score, seconds, EOS in ids[-1:], was_stopped)
