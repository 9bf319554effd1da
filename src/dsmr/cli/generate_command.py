"""`dsmr generate`: new pieces from nothing, or continuations of a file, a folder or a split."""

import shlex
import time
from itertools import chain
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from tqdm.auto import tqdm

from dsmr import UserError
from dsmr.cli.common_options import JSON, add_options, bar, check_device, check_output, write_result
from dsmr.cli.parser import OneLineParser
from dsmr.data.sources import SPLITS
from dsmr.generate import Generator, Prompt, Sampling, check_seed
from dsmr.generate.audio import check_audio
from dsmr.generate.continuations import continuations
from dsmr.generate.piece_files import (
    Prompts,
    folder_prompts,
    numbered,
    output_files,
    split_prompts,
    write_continuation,
)
from dsmr.results.plotting import check_plots

SECONDS, MOST_SECONDS = 120.0, 3600.0
SECONDS_OF_MANY = 30.0  # of each prompt and of each continuation, for a folder or a split
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of music [{elapsed}<{remaining}, {rate_noinv_fmt}]"
OPTIONS = {
    "--prompt": (
        str | None,
        None,
        "Music to continue: a MIDI file, a folder of MIDI files, or a split of the checkpoint's data (train, "
        "validation or test). Default: start from nothing.",
    ),
    "--prompt_seconds": (
        float | None,
        None,
        f"Seconds of each prompt to use (default: all of a file; {SECONDS_OF_MANY:g} for a folder or a split).",
    ),
    "--limit": (int | None, None, "Continue only the first pieces of the folder or split (default: all)."),
    "--data.path": (str | None, None, "Data whose split is continued (default: the checkpoint's training data)."),
    "--data.validation_stride": (int | None, None, "Use every n-th validation piece (default: as in training)."),
    "--seconds": (
        float | None,
        None,
        f"Seconds of new music (default: {SECONDS:g}; {SECONDS_OF_MANY:g} for a folder or a split; with --until_end "
        f"at most {MOST_SECONDS:g}).",
    ),
    "--num": (int, 1, "Continuations of each prompt, generated as one batch; the k-th uses seed + k - 1."),
    "--seed": (int, 0, "Random seed."),
    "--temperature": (float, 1.0, "Divisor of the logits; lower values make the music more predictable."),
    "--top_k": (int, 0, "Sample from the k most likely tokens (0: all)."),
    "--top_p": (float, 0.98, "Sample from the smallest set of tokens with this total probability (1: all)."),
    "--min_p": (float, 0.0, "Ignore tokens below this fraction of the highest probability."),
    "--max_note_seconds": (float | None, None, "End notes after this many seconds (default: no limit)."),
    "--horizons": (str | None, None, "Horizons to generate with (default: those of training)."),
    "--device": (str, "cpu", "Device that runs the network: cpu, cuda, ..."),
    "--sound_font": (str | None, None, "General MIDI sound font for --audio (default: search for one)."),
    "--until_end": (None, False, "Stop where the model ends the piece."),
    "--audio": (None, False, "Also render a WAV file with FluidSynth."),
    "--plot": (None, False, "Also draw a piano roll, NAME.png."),
    **JSON,
}


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr generate`."""
    description = "Generate music with a trained model, from nothing or continuing existing pieces."
    parser = OneLineParser("dsmr generate", description)
    parser.add_argument("--config", action="config", help="YAML file with options of this command.")
    text = "Run folder, checkpoint file or exported folder."
    parser.add_argument("--checkpoint", type=str, required=True, help=text)
    text = "MIDI file to write (with --num 2, NAME-1 and NAME-2); a folder if --prompt is a folder or a split."
    parser.add_argument("--output", type=str, required=True, help=text)
    add_options(parser, OPTIONS)
    options = parser.parse_args(arguments)
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
    write_result(result, as_json=options.json)
    return 0


def check_options(options: Namespace) -> bool:
    """Check the options and fill in defaults; return True if there are many prompts."""
    prompt = options.prompt
    has_many = prompt is not None and (prompt in SPLITS or Path(prompt).expanduser().is_dir())
    if options.num < 1:
        raise UserError(f"--num is {options.num}; it must be at least 1")
    check_outputs(options, has_many)
    if options.seconds is None:
        options.seconds = MOST_SECONDS if options.until_end else SECONDS_OF_MANY if has_many else SECONDS
    if not options.seconds > 0:
        raise UserError(f"--seconds is {options.seconds:g}; it must be above 0")
    check_seed("--seed", options.seed, options.num)
    if prompt is None and options.prompt_seconds is not None:
        raise UserError("--prompt_seconds says how much of a --prompt is used; give one")
    if options.prompt_seconds is None and has_many:
        options.prompt_seconds = SECONDS_OF_MANY
    if options.limit is not None and not (has_many and options.limit > 0):
        raise UserError("--limit is the number of pieces of a folder or split; give one as --prompt, and at least 1")
    if prompt not in SPLITS and any(value is not None for value in vars(options.data).values()):
        raise UserError(f"--data options choose the pieces of a split; add --prompt {' or '.join(SPLITS)}")
    if options.plot:
        check_plots()
    options.sound_font = check_audio(options.sound_font) if options.audio else None
    return has_many


def check_outputs(options: Namespace, has_many: bool) -> None:
    """Raise UserError if the outputs cannot be written, or would overwrite the prompt."""
    path, is_midi = Path(options.output), Path(options.output).suffix.lower() in (".mid", ".midi")
    if has_many:
        if path.is_file() or (is_midi and not path.is_dir()):
            raise UserError(f"--output {path}: the prompt has many pieces; name a folder")
        if path.is_dir() and Path(options.prompt).is_dir() and path.samefile(options.prompt):
            raise UserError(f"--output {path} is the folder of the prompts, which would be lost; name another folder")
        return
    check_output(options.output)
    if not is_midi:
        raise UserError(f"--output {path}: a MIDI file is written; let its name end with .mid")
    for one in numbered(path, options.num):
        if options.prompt and one.exists() and one.samefile(options.prompt):
            raise UserError(f"--output {one} is the prompt itself, which would be lost; name another file")


def prompts_of(options: Namespace, generator: Generator) -> Prompts:
    """Return the prompts that the options name."""
    given, seconds = options.prompt, options.prompt_seconds
    if given is None:
        return Prompts([""], lambda _: Prompt())
    if given not in SPLITS and (path := Path(given).expanduser()).is_dir():
        return folder_prompts(generator, path, seconds)
    if given not in SPLITS:
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
        both = f"{options.checkpoint} and the settings of its run"
        raise UserError(f"{both} have different tokenizers; give --data.path")
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
            wanted = {name: options[name] for name in ("seconds", "num", "seed", "until_end")}
            made = continuations(generator, prompt, **wanted, progress=advance)
            elapsed += time.perf_counter() - began
            for one, path in zip(made, paths[name], strict=True):
                piece = write_continuation(one, path, prompt, options.sound_font, picture=options.plot)
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
    notes = sum(piece["notes"] for piece in pieces)
    totals = {"tokens": num_tokens, "notes": notes, "music_seconds": music, "seconds": elapsed}
    speed = {"tokens_per_second": num_tokens / elapsed, "times_real_time": music / elapsed}
    return {"pieces": pieces, **totals, **speed}
