"""Horizons: how many past tokens each layer keeps.

A horizon `H_l` is the number of tokens whose keys and values layer l keeps. `horizons` lists them from bottom to
top; their sum is the budget. Their one spelling, `2x3584+10x512`, reads bottom to top: two layers of 3,584
tokens, then ten of 512. Budgeting memory over the depth is the idea of Depth-Structured Music Recurrence (arXiv
2602.19816), whose window lengths are not public: the numbers here are ours.

No torch in this file. `schedules` computes horizons from a rule; `dsmr.attention.visibility` says how far they reach.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from dsmr import UserError

TOKENS_PER_SECOND = 39.8
"""Tokens of the `performance` encoding in one second of music: the mean over the whole of MAESTRO v3.0.0."""


@dataclass(frozen=True)
class TokenRate:
    """Tokens per second of music, which converts tokens to time.

    Attributes:
        per_second: mean over a collection of pieces.
        collection: its name, unless it is the data at hand.
    """

    per_second: float
    collection: str | None = None

    def seconds(self, tokens: float) -> float:
        """Convert tokens to seconds of music."""
        return tokens / self.per_second

    @property
    def label(self) -> str:
        """The unit to print after a time: `s of music`, or `s of music in MAESTRO`."""
        return "s of music" + (f" in {self.collection}" if self.collection else "")


MAESTRO_RATE = TokenRate(TOKENS_PER_SECOND, "MAESTRO")
"""Used where no data are known."""

FULL_HORIZON = 4096
"""Tokens that every layer of the reference keeps, about 103 seconds of music: hence its name, full-4096."""


def token_rate(section: Mapping[str, Any]) -> TokenRate | None:
    """Return the tokens per second of the music that a network was trained on.

    Sections of older versions do not record it: MAESTRO's rate is used with `performance` tokens, otherwise None.
    """
    known = section.get("tokens_per_second")
    if known is not None:
        return TokenRate(known)
    return MAESTRO_RATE if (section.get("tokenizer") or {}).get("name") == "performance" else None


def parse_horizons(text: str) -> tuple[int, ...]:
    """Parse horizons: `2x3584+10x512` is (3584, 3584, 512, ... 512), bottom to top.

    Raises:
        UserError: the string is not a list of terms `COUNTxTOKENS` joined by `+`.
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
    """Return the one spelling of horizons; the inverse of `parse_horizons`."""
    return "+".join(f"{len(list(run))}x{tokens}" for tokens, run in groupby(horizons))


def check_horizons(horizons: Sequence[int], segment_length: int, memory_block: int) -> None:
    """Reject horizons that the memory's ring cannot hold.

    Raises:
        UserError: `memory_block` does not divide `segment_length` and every horizon (all in tokens).
    """
    if memory_block < 1 or segment_length < 1:
        raise UserError(f"memory_block ({memory_block}) and segment_length ({segment_length}) must be >= 1")
    if segment_length % memory_block:
        raise UserError(
            f"segment_length {segment_length} is not a multiple of memory_block {memory_block}; "
            f"use {_nearest(segment_length, memory_block)}"
        )
    if min(horizons, default=0) < 0:
        raise UserError(f"horizon {min(horizons)} in {list(horizons)} is negative; 0 keeps nothing")
    for horizon in horizons:
        if horizon % memory_block:
            raise UserError(
                f"horizon {horizon} in {format_horizons(horizons)} is not a multiple of memory_block "
                f"{memory_block}; use {horizon // memory_block * memory_block} or "
                f"{(horizon // memory_block + 1) * memory_block}"
            )


def describe_horizons(horizons: Sequence[int], rate: TokenRate | None = MAESTRO_RATE) -> str:
    """Return the spelling, the budget in tokens, and the longest horizon in seconds (unless `rate` is None)."""
    longest = max(horizons)
    time = "" if rate is None else f", longest {rate.seconds(longest):.0f} {rate.label}"
    return f"{format_horizons(horizons)} (budget {sum(horizons):,} tokens{time})"


def draw_horizons(horizons: Sequence[int], rate: TokenRate | None = MAESTRO_RATE, *, width: int = 32) -> str:
    """Return a bar chart with one line per layer, the top layer first: tokens, seconds, and share of full-4096.

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
    """Return a bar of `length` characters, in steps of an eighth; never empty for a positive length."""
    eighths = max(round(8 * length), 1 if length else 0)
    return "\u2588" * (eighths // 8) + " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"[eighths % 8].strip()


def _nearest(tokens: int, block: int) -> str:
    below = tokens // block * block
    return f"{below} or {below + block}" if below else str(block)
