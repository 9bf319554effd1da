"""Horizons: how many past tokens each layer keeps, and the schedules that spend a budget over the depth.

A horizon `H_l` is the number of tokens of which layer l keeps the keys and values; `horizons` lists them from
the bottom layer to the top, the budget is their sum. Their one spelling, `2x3584+10x512`, reads bottom to top:
two layers of 3,584 tokens, then ten of 512. The idea of a depth-structured budget is that of Depth-Structured
Music Recurrence (arXiv 2602.19816); its window lengths are not public, so the numbers here are ours.

`schedules` has the rules that give every layer its horizon. No torch in this file: horizons are arithmetic.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from dsmr import UserError

TOKENS_PER_SECOND = 39.8
"""Tokens of the `performance` encoding in one second of music: the mean over the whole of MAESTRO v3.0.0."""


@dataclass(frozen=True)
class TokenRate:
    """How many tokens one second of music has, to tell a number of tokens as time.

    Attributes:
        per_second: mean over a collection of pieces.
        collection: its name, where it is not the data at hand.
    """

    per_second: float
    collection: str | None = None

    def seconds(self, tokens: float) -> float:
        """Seconds of music in so many tokens."""
        return tokens / self.per_second

    @property
    def label(self) -> str:
        """What stands behind a time: `s of music`, or `s of music in MAESTRO`."""
        return "s of music" + (f" in {self.collection}" if self.collection else "")


MAESTRO_RATE = TokenRate(TOKENS_PER_SECOND, "MAESTRO")
"""What is shown where no data are known."""

FULL_HORIZON = 4096
"""Tokens that every layer of the reference keeps, about 103 seconds of music: hence its name, full-4096."""

Rule = Literal["boundary", "sliding"]
"""What a query sees: its own segment and H_l tokens before that, or the last H_l tokens wherever it stands."""


def token_rate(section: Mapping[str, Any]) -> TokenRate | None:
    """Tokens in a second of the music that a network was trained on.

    A section that does not say so, as of older versions, has MAESTRO's with `performance` tokens, and else none.
    """
    known = section.get("tokens_per_second")
    if known is not None:
        return TokenRate(known)
    return MAESTRO_RATE if (section.get("tokenizer") or {}).get("name") == "performance" else None


def parse_horizons(text: str) -> tuple[int, ...]:
    """Read horizons in their one spelling: `2x3584+10x512` is (3584, 3584, 512, ... 512), bottom to top.

    Raises:
        UserError: the text is not terms `COUNTxTOKENS` joined by `+`.
    """
    horizons: list[int] = []
    for term in text.replace(" ", "").split("+"):
        match = re.fullmatch(r"(?:(\d+)x)?(\d+)", term)
        if match is None or match[1] == "0":
            raise UserError(
                f"horizons {text!r}: {term!r} is not LAYERSxTOKENS; write them bottom to top as in 2x3584+10x512"
            )
        horizons += [int(match[2])] * int(match[1] or 1)
    return tuple(horizons)


def format_horizons(horizons: Sequence[int]) -> str:
    """The one spelling of horizons; the inverse of `parse_horizons`."""
    return "+".join(f"{len(list(run))}x{tokens}" for tokens, run in groupby(horizons))


def check_horizons(horizons: Sequence[int], segment_length: int, memory_block: int) -> None:
    """Refuse horizons that the memory's ring cannot hold.

    Raises:
        UserError: `memory_block` does not divide `segment_length` and every horizon (all in tokens).
    """
    if memory_block < 1 or segment_length < 1:
        raise UserError(f"memory_block ({memory_block}) and segment_length ({segment_length}) must be >= 1")
    if segment_length % memory_block:
        raise UserError(
            f"segment_length {segment_length} is not a multiple of memory_block {memory_block}; "
            f"{_nearest(segment_length, memory_block)} would be"
        )
    if min(horizons, default=0) < 0:
        raise UserError(f"horizon {min(horizons)} in {list(horizons)} is below 0; 0 keeps nothing")
    for horizon in horizons:
        if horizon % memory_block:
            raise UserError(
                f"horizon {horizon} in {format_horizons(horizons)} is not a multiple of memory_block "
                f"{memory_block}; {horizon // memory_block * memory_block} or "
                f"{(horizon // memory_block + 1) * memory_block} would be"
            )


def earliest(position: int, horizons: Sequence[int], segment_length: int, rule: Rule = "boundary") -> int:
    """Earliest position that the prediction at `position` can depend on, through all layers from the top down.

    Under `boundary` each layer leads from a token to its segment's start and `H_l` tokens further back; under
    `sliding` to the `H_l - 1` tokens before it, or to its segment's start where `H_l = 0`. Below 0 means: before
    the piece's beginning.
    """
    for horizon in reversed(horizons):
        start = position // segment_length * segment_length
        position = position - horizon + 1 if rule == "sliding" and horizon else start - horizon
    return position


def receptive_field(horizons: Sequence[int], segment_length: int, rule: Rule = "boundary") -> tuple[int, ...]:
    """Tokens before a segment's start that its first position can depend on after 1, 2, ... L layers."""
    far = segment_length * (sum(horizons) + 1)  # a segment's start with room enough before it
    return tuple(far - earliest(far, horizons[: layer + 1], segment_length, rule) for layer in range(len(horizons)))


def describe(horizons: Sequence[int], rate: TokenRate | None = MAESTRO_RATE) -> str:
    """One line: the spelling, its budget in tokens, and the longest horizon in seconds of music.

    Args:
        horizons: bottom to top.
        rate: of the data; None leaves out the seconds.
    """
    longest = max(horizons)
    time = "" if rate is None else f", longest {rate.seconds(longest):.0f} {rate.label}"
    return f"{format_horizons(horizons)} (budget {sum(horizons):,} tokens{time})"


def picture(horizons: Sequence[int], rate: TokenRate | None = MAESTRO_RATE, *, width: int = 32) -> str:
    """One line for each layer, the top layer first: a bar, tokens, seconds of music, share of full-4096.

    Args:
        horizons: bottom to top.
        rate: of the data; None leaves out the seconds.
        width: of the longest bar, in characters.
    """
    unit = max(*horizons, 1) / width
    return "\n".join(
        f"  {layer:>3} {_bar(horizons[layer] / unit):<{width}} {horizons[layer]:>7,} tokens "
        + ("" if rate is None else f"{rate.seconds(horizons[layer]):>6.1f} s ")
        + f"{horizons[layer] / FULL_HORIZON:>5.0%}"
        for layer in reversed(range(len(horizons)))
    )


def _bar(length: float) -> str:
    """A bar of so many characters, to an eighth of one; what is above nothing is seen."""
    eighths = max(round(8 * length), 1 if length else 0)
    return "\u2588" * (eighths // 8) + " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"[eighths % 8].strip()


def _nearest(tokens: int, block: int) -> str:
    below = tokens // block * block
    return f"{below} or {below + block}" if below else str(block)
