"""Several continuations of one prompt, of a given length, as MIDI scores."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from symusic import Score

from dsmr.data.tokenizer import EOS, PAD, TICKS_PER_SECOND, Performance
from dsmr.generate.generator import Generator
from dsmr.generate.grammar import Grammar
from dsmr.generate.music import NewMusic, closed, compose
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
        seconds: of new music, in whole ticks of 10 ms; with `until_end` the most.
        num: continuations; the k-th is what a single one with the seed `seed + k` gives.
        seed: of the first one's draws.
        until_end: whether the model may end the piece.
        progress: called now and then, and at the end, with the seconds of new music that all of them have together,
            from 0 to `num * seconds`.

    Raises:
        UserError: no seconds, or no continuations.
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
            lanes.look()
            if progress:
                progress(lanes.seconds)
            if lanes.are_over:
                break
    lanes.look()
    if progress:
        progress(lanes.seconds)
    return [
        _finished(generator, prompt, lanes.cut(lane), last_tick, reached=lanes.reached[lane], goal=goal)
        for lane in range(num)
    ]


class Lanes:
    """The new tokens of all continuations, and how many seconds of new music each has.

    Args:
        generator: tokenizer and grammar.
        prompt: what is continued.
        grammar: which knows the time of `performance` tokens.
        num: lanes.
        goal: seconds of new music.
    """

    def __init__(self, generator: Generator, prompt: Prompt, grammar: Grammar, num: int, goal: float) -> None:
        self.prompt, self.grammar, self.goal = prompt, grammar, goal
        self.ids: list[list[int]] = [[] for _ in range(num)]
        self.reached = [0.0] * num
        is_performance = isinstance(generator.tokenizer, Performance)
        self.music = None if is_performance else NewMusic(generator.tokenizer, prompt)
        self._looked_at, self._window = [0] * num, [(0, 0)] * num

    def append(self, tokens: list[int]) -> None:
        """Take the tokens of a step; a lane that has ended gives PAD."""
        for ids, token in zip(self.ids, tokens, strict=True):
            if token != PAD:
                ids.append(token)

    def look(self) -> None:
        """Measure how far each lane has come, in seconds from 0 to the goal."""
        if self.music is None:
            ticks = self.grammar.tick_B.tolist()
            found = [(tick - self.prompt.first_tick) / TICKS_PER_SECOND for tick in ticks]
            self.reached = [min(max(seconds, 0.0), self.goal) for seconds in found]
            return
        for lane, ids in enumerate(self.ids):
            if self.reached[lane] < self.goal:
                self.reached[lane] = min(self.music.reached(ids), self.goal)
                self._window[lane] = (self._looked_at[lane], len(ids))
                self._looked_at[lane] = len(ids)

    @property
    def seconds(self) -> float:
        """Of new music, all lanes together."""
        return min(sum(self.reached), self.goal * len(self.ids))

    @property
    def are_over(self) -> bool:
        """True where every lane has come to the goal, or to the end of its piece."""
        pairs = zip(self.reached, self.ids, strict=True)
        return all(seconds >= self.goal or EOS in ids[-1:] for seconds, ids in pairs)

    def cut(self, lane: int) -> list[int]:
        """Tokens of a lane up to those that bring it to the goal, however long other lanes went on.

        Those of `performance` are cut to the tick by `closed`.
        """
        ids = self.ids[lane]
        if self.music is None or self.reached[lane] < self.goal:
            return ids
        low, high = self._window[lane]  # before the goal, and at it
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.music.reached(ids[:middle]) >= self.goal else (middle, high)
        return ids[:high]


def _finished(
    generator: Generator, prompt: Prompt, ids: list[int], last_tick: int, *, reached: float, goal: float
) -> Continuation:
    was_stopped = reached < goal and EOS not in ids[-1:]
    tokenizer = generator.tokenizer
    if isinstance(tokenizer, Performance):
        tick = prompt.first_tick + round(reached * TICKS_PER_SECOND)
        ids = closed(tokenizer, prompt, ids, tick + 1 if was_stopped else last_tick)
        score = compose(tokenizer, prompt, ids)
        seconds = max(float(score.to("second").end()) - prompt.seam, 0.0)
    else:
        score = compose(tokenizer, prompt, ids, goal)
        seconds = NewMusic(tokenizer, prompt).end(ids, goal)
    return Continuation(ids, score, seconds, EOS in ids[-1:], was_stopped)
