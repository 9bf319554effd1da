"""`dsmr generate`: new pieces from nothing, or continuations of a file, a folder or a split."""

import shlex
import time
from itertools import chain
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from tqdm.auto import tqdm

from dsmr import UserError
from dsmr.cli.generate_options import check_options, generate_parser
from dsmr.cli.json_output import write_result
from dsmr.cli.progress import bar
from dsmr.cli.torch_device import check_device
from dsmr.data.sources import SPLITS
from dsmr.generate import Generator, Prompt, Sampling
from dsmr.generate.continuations import continuations
from dsmr.generate.piece_files import (
    Prompts,
    folder_prompts,
    numbered,
    output_files,
    split_prompts,
    write_continuation,
)

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of music [{elapsed}<{remaining}, {rate_noinv_fmt}]"


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr generate`."""
    options = generate_parser().parse_args(arguments)
    has_many = check_options(options)
    device = check_device(options.device)
    generator = Generator.load(
        options.checkpoint,
        horizons=options.horizons,
        sampling=Sampling(options.temperature, options.top_k, options.top_p, options.min_p),
        max_note_seconds=options.max_note_seconds,
        device=device,
        # a single prompt does not amortise compiling kernels
        attention="auto" if has_many or device.type != "cuda" else "materialised",
    )
    prompts = prompts_of(options, generator)
    if has_many:
        prompts.names = prompts.names[: options.limit]
        paths = output_files(Path(options.output), prompts.names, options.num)
    else:
        paths = {name: numbered(Path(options.output), options.num) for name in prompts.names}
    result = generate(options, generator, prompts, paths)
    if has_many:
        print(f"{len(result['pieces'])} continuations in {options.output}")
        data = ["--data.path", options.data.path] if options.data.path else []
        print("next:", shlex.join(["dsmr", "judge", options.output, *data]))
        result |= {"folder": options.output, "num": len(result["pieces"]), "refused": prompts.refused}
    else:
        print(f"next: play {result['pieces'][0]['output']}, or try --temperature 0.9 and another --seed")
    write_result(result, as_json=options.json, output=None)
    return 0


def prompts_of(options: Namespace, generator: Generator) -> Prompts:
    """Return the prompts that the options name."""
    given, seconds = options.prompt, options.prompt_seconds
    if given is None:
        return Prompts([""], lambda _: Prompt())
    if given not in SPLITS:
        path = Path(given).expanduser()
        if path.is_dir():
            return folder_prompts(generator, path, seconds)
        return Prompts([given], lambda _: generator.prompt(given, seconds))
    from dsmr.cli.lightning_cli import SizesCLI

    arguments = ["--checkpoint", options.checkpoint]
    if options.data.path is not None:
        arguments += ["--data.path", options.data.path, "--data.recall", "null"]
    if options.data.validation_stride is not None:
        arguments += ["--data.validation_stride", str(options.data.validation_stride)]
    data = SizesCLI("generate", arguments).datamodule
    data.progress, options.data.path = bar("tokenising"), data.path
    if dict(data.tokenizer.vocab) != dict(generator.tokenizer.vocab):
        raise UserError(
            f"{options.checkpoint} and the settings of its run have different tokenizers; give --data.path"
        )
    return split_prompts(data, given, seconds)


def generate(
    options: Namespace, generator: Generator, prompts: Prompts, paths: dict[str, list[Path]]
) -> dict[str, Any]:
    """Generate and write all continuations; return the results for JSON."""
    pieces: list[dict[str, Any]] = []
    num_tokens, elapsed, seconds = 0, 0.0, options.seconds * options.num
    pending = iter(prompts)
    first = next(pending, None)  # read before the bar is drawn, since the only prompt may be unusable
    if first is None:
        raise UserError("; ".join(list(prompts.refused.values())[:3]))
    with tqdm(total=seconds * len(prompts.names), desc="music", unit="s", bar_format=BAR) as line:
        for number, (name, prompt) in enumerate(chain([first], pending)):
            if prompt.score is not None:
                line.write(f"continuing {name} from {prompt.seam:.2f} s on, after {len(prompt.ids):,} tokens")

            def advance(done: float, before: float = number * seconds) -> None:
                line.n = min(before + done, line.total)  # a rounded sum must not exceed the bar's total
                line.update(0)

            began = time.perf_counter()
            made = continuations(
                generator,
                prompt,
                seconds=options.seconds,
                num=options.num,
                seed=options.seed,
                until_end=options.until_end,
                progress=advance,
            )
            elapsed += time.perf_counter() - began
            for one, path in zip(made, paths[name], strict=True):
                piece = write_continuation(one, path, prompt, options.sound_font, picture=options.picture)
                end = "; the model ended the piece" if one.has_ended else ""
                if one.was_stopped:
                    end = "; stopped: the model writes hardly any time; train it longer, or lower --temperature"
                line.write(f"{path}: {piece['notes']} new notes, {one.seconds:.1f} s of new music{end}")
                num_tokens += len(one.ids)
                pieces.append(piece)
    for name, reason in prompts.refused.items():
        print(f"not continued: {name}: {reason}")
    music = sum(piece["music_seconds"] for piece in pieces)
    print(f"{num_tokens / elapsed:.0f} tokens/s, {music / elapsed:.1f} s of music per second")
    return {
        "pieces": pieces,
        "tokens": num_tokens,
        "notes": sum(piece["notes"] for piece in pieces),
        "music_seconds": music,
        "seconds": elapsed,
        "tokens_per_second": num_tokens / elapsed,
        "times_real_time": music / elapsed,
    }
