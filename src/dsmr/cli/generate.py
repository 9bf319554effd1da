"""`dsmr generate`: a piece from nothing, by a trained model."""

import time

from jsonargparse import ArgumentParser

from dsmr import checkpoint as checkpoints
from dsmr.cli.configs import resolve_configs
from dsmr.cli.outcome import check_output, write_result
from dsmr.cli.parser import explain
from dsmr.data.tokenizer import BOS, EOS, MASK, PAD, TokenizerSpec, build_tokenizer, decode
from dsmr.generate import sample_tokens

MAX_TOKENS_PER_SECOND = 400
"""Ten times what MAESTRO has: a model that writes no time shifts is stopped there."""
CHECK_EVERY = 64
"""Tokens between two looks at the music's length."""


def parser() -> ArgumentParser:
    """Options of the command."""
    made = OneLine(prog="dsmr generate", description="Music from nothing, by a trained model.")
    made.add_argument("--config", action="config", help="Options in a YAML file.")
    made.add_argument("--checkpoint", type=str, required=True, help="A run (its best) or a checkpoint file.")
    made.add_argument("--output", type=str, required=True, help="The MIDI file to write.")
    made.add_argument("--seconds", type=float, default=60.0, help="Length of the music.")
    made.add_argument("--temperature", type=float, default=1.0, help="Below 1: likelier, above 1: wilder.")
    made.add_argument("--top_p", type=float, default=0.98, help="Draw only from the likeliest tokens of this mass.")
    made.add_argument(
        "--horizons", type=str | None, default=None, help="Other horizons than the trained ones: longer, shorter, off."
    )
    made.add_argument("--seed", type=int, default=0, help="Of the draws.")
    made.add_argument("--json", action="store_true", help="Figures as JSON on the last line of stdout.")
    return made


class OneLine(ArgumentParser):
    """A parser whose mistakes are one line."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]  # noqa: D102
        raise ValueError(explain(message, list(self.get_defaults().keys()), []))


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr generate`."""
    options = parser().parse_args(resolve_configs(arguments))
    output = check_output(options.output)
    assert output is not None
    if options.seconds <= 0:
        raise ValueError(f"--seconds {options.seconds} must be above 0")
    loaded = checkpoints.load(options.checkpoint, horizons=options.horizons)
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.path} names no tokenizer; train with dsmr fit")
    tokenizer = build_tokenizer(TokenizerSpec(**loaded.tokenizer))
    ids = [BOS]
    began = time.perf_counter()
    stream = sample_tokens(
        loaded.backbone,
        [BOS],
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        forbidden=(PAD, BOS, EOS, MASK),
    )
    for id_ in stream:
        ids.append(id_)
        if len(ids) > MAX_TOKENS_PER_SECOND * options.seconds + CHECK_EVERY:
            break
        if len(ids) % CHECK_EVERY == 0 and decode(tokenizer, ids).to("second").end() > options.seconds:
            break
    elapsed = time.perf_counter() - began
    score = decode(tokenizer, ids)
    score.dump_midi(output)
    figures = {
        "output": str(output),
        "tokens": len(ids),
        "notes": score.note_num(),
        "music_seconds": float(score.to("second").end()),
        "tokens_per_second": len(ids) / elapsed,
    }
    print(
        f"{output}: {figures['notes']} notes, {figures['music_seconds']:.1f} s of music, "
        f"{figures['tokens_per_second']:.0f} tokens/s"
    )
    print(f"next: play {output}, or try --temperature 0.9 and another --seed")
    write_result(figures, as_json=options.json, output=None)
    return 0
