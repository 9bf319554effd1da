"""`dsmr generate`: a piece from nothing or the continuation of one, by a trained model."""

import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from symusic import Score
from tqdm.auto import tqdm

from dsmr import UserError
from dsmr.cli.configs import resolve_configs
from dsmr.cli.json_output import check_output, write_result
from dsmr.cli.options import OneLine, underscored
from dsmr.data.files import replacing
from dsmr.generate import Generator, Prompt, Sampling, check_seed
from dsmr.generate.audio import check_audio, render
from dsmr.generate.continuations import Continuation, continuations

SECONDS, MOST_SECONDS = 120.0, 3600.0
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of music [{elapsed}<{remaining}, {rate_noinv_fmt}]"


def parser() -> ArgumentParser:
    """Options of the command."""
    made = OneLine(prog="dsmr generate", description="Music by a trained model: from nothing, or a piece continued.")
    made.add_argument("--config", action="config", help="Options in a YAML file.")
    made.add_argument(
        "--checkpoint", type=str, required=True, help="A run (its best), a checkpoint file or an exported folder."
    )
    made.add_argument(
        "--output", type=str, required=True, help="The MIDI file to write; with --num 2, NAME-1, NAME-2."
    )
    made.add_argument("--prompt", type=str | None, default=None, help="A MIDI file to continue.")
    made.add_argument("--prompt_seconds", type=float | None, default=None, help="So much of it; null: all.")
    made.add_argument(
        "--seconds",
        type=float | None,
        default=None,
        help=f"Of new music; null: {SECONDS:g}, or {MOST_SECONDS:g} at most.",
    )
    made.add_argument("--until_end", action="store_true", help="Let the model end the piece; --seconds is the most.")
    made.add_argument("--num", type=int, default=1, help="Continuations, made at once; the k-th has seed + k - 1.")
    made.add_argument("--seed", type=int, default=0, help="Of the draws.")
    made.add_argument("--temperature", type=float, default=1.0, help="Below 1: likelier, above 1: wilder.")
    made.add_argument("--top_k", type=int, default=0, help="Draw only from so many of the likeliest tokens; 0: all.")
    made.add_argument("--top_p", type=float, default=0.98, help="Only from the likeliest tokens of this mass; 1: all.")
    made.add_argument(
        "--min_p", type=float, default=0.0, help="Only from tokens of this share of the likeliest one's."
    )
    made.add_argument(
        "--max_note_seconds",
        type=float | None,
        default=None,
        help="End notes after so long; null: when the model does.",
    )
    made.add_argument(
        "--horizons", type=str | None, default=None, help="Other horizons than the trained ones: longer, shorter, off."
    )
    made.add_argument("--device", type=str, default="cpu", help="Where the network runs: cpu, cuda, ...")
    made.add_argument("--audio", action="store_true", help="Also a WAV file, by FluidSynth.")
    made.add_argument(
        "--sound_font", type=str | None, default=None, help="A General MIDI sound font; null: look for one."
    )
    made.add_argument("--picture", action="store_true", help="Also a piano roll, NAME.png.")
    made.add_argument("--json", action="store_true", help="Figures as JSON on the last line of stdout.")
    return made


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr generate`."""
    options = parser().parse_args(underscored(resolve_configs(arguments)))
    outputs, seconds, sound_font = check(options)
    device = check_device(options.device)
    generator = Generator.load(
        options.checkpoint,
        horizons=options.horizons,
        sampling=Sampling(options.temperature, options.top_k, options.top_p, options.min_p),
        max_note_seconds=options.max_note_seconds,
        device=device,
        attention="materialised" if device.type == "cuda" else "auto",  # one prompt does not pay for compiling kernels
    )
    prompt = Prompt() if options.prompt is None else generator.prompt(options.prompt, options.prompt_seconds)
    if options.prompt is not None:
        print(f"continuing {options.prompt} from {prompt.seam:.2f} s on, after {len(prompt.ids):,} tokens", flush=True)
    began = time.perf_counter()
    with tqdm(total=seconds * options.num, desc="music", unit="s", bar_format=BAR) as bar:

        def advance(done: float) -> None:
            bar.n = min(done, bar.total)  # a sum of steps would be rounded beyond it
            bar.update(0)

        made = continuations(
            generator,
            prompt,
            seconds=seconds,
            num=options.num,
            seed=options.seed,
            until_end=options.until_end,
            progress=advance,
        )
    elapsed = time.perf_counter() - began
    pieces = [
        written(one, path, prompt, sound_font, picture=options.picture)
        for one, path in zip(made, outputs, strict=True)
    ]
    figures = conclude(made, pieces, elapsed)
    print(f"next: play {outputs[0]}, or try --temperature 0.9 and another --seed")
    write_result(figures, as_json=options.json, output=None)
    return 0


def check(options: Namespace) -> tuple[list[Path], float, Path | None]:
    """Output files, seconds and sound font, before any work is done for them.

    Raises:
        UserError: something of it cannot be.
    """
    outputs = output_files(options.output, options.num)
    seconds = options.seconds if options.seconds is not None else MOST_SECONDS if options.until_end else SECONDS
    if not seconds > 0:
        raise UserError(f"--seconds is {seconds:g}; it must be above 0")
    check_seed("--seed", options.seed, options.num)
    same = [path for path in outputs if options.prompt and path.exists() and path.samefile(options.prompt)]
    if same:
        raise UserError(f"--output {same[0]} is the prompt itself, which would be lost; name another file")
    if options.prompt is None and options.prompt_seconds is not None:
        raise UserError("--prompt_seconds says how much of a --prompt is used; give one")
    if options.picture:
        from dsmr.results.plotting import check_plots

        check_plots()
    return outputs, seconds, check_audio(options.sound_font) if options.audio else None


def conclude(made: list[Continuation], pieces: list[dict[str, Any]], elapsed: float) -> dict[str, Any]:
    """Say what was made, and give its figures."""
    for one, piece in zip(made, pieces, strict=True):
        end = "; the model ended the piece" if one.has_ended else ""
        if one.was_stopped:
            end = "; stopped, since the model hardly writes time: train it longer, or lower --temperature"
        print(f"{piece['output']}: {piece['notes']} new notes, {one.seconds:.1f} s of new music{end}")
    tokens, music = sum(len(one.ids) for one in made), sum(one.seconds for one in made)
    print(f"{tokens / elapsed:.0f} tokens/s, {music / elapsed:.1f} s of music per second")
    return {
        "pieces": pieces,
        "tokens": tokens,
        "notes": sum(piece["notes"] for piece in pieces),
        "music_seconds": music,
        "seconds": elapsed,
        "tokens_per_second": tokens / elapsed,
        "times_real_time": music / elapsed,
    }


def written(
    one: Continuation, path: Path, prompt: Prompt, sound_font: Path | None, *, picture: bool
) -> dict[str, Any]:
    """Write a piece, its sound and its picture where asked; gives what was made."""
    content = one.score.dumps_midi()
    try:
        with replacing(path) as file:
            file.write(content)
        files: dict[str, Any] = {"output": str(path)}
        if sound_font is not None:
            files["audio"] = str(path.with_suffix(".wav"))
            render(path, path.with_suffix(".wav"), sound_font)
        if picture:
            from dsmr.generate.piano_roll import plot_piano_roll

            files["picture"] = str(path.with_suffix(".png"))
            seam = prompt.seam if prompt.score is not None else None
            plot_piano_roll(Score.from_midi(content), path.with_suffix(".png"), title=path.stem, seam=seam)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error})") from error
    new = (
        sum(note.time >= prompt.seam - 0.005 for note in one.score.to("second").tracks[0].notes)
        if one.score.tracks
        else 0
    )
    return files | {"notes": int(new), "music_seconds": one.seconds, "has_ended": one.has_ended}


def output_files(given: str, num: int) -> list[Path]:
    """Where the pieces go, before any work is done for them.

    Raises:
        UserError: no piece is asked for, or the folder is missing or cannot be written.
    """
    if num < 1:
        raise UserError(f"--num is {num}; it must be at least 1")
    path = check_output(given)
    assert path is not None
    if path.suffix.lower() not in (".mid", ".midi"):
        raise UserError(f"--output {given}: a MIDI file is written; let its name end with .mid")
    return [path] if num == 1 else [path.with_stem(f"{path.stem}-{number}") for number in range(1, num + 1)]


def check_device(name: str) -> torch.device:
    """A device that is there.

    Raises:
        UserError: it is not; naming those that are.
    """
    kind, _, index = name.partition(":")
    here = devices_here()
    is_one = kind in here and (index == "" or (index.isdecimal() and int(index) < here[kind]))
    if not is_one:
        known = [one for kind, num in here.items() for one in (kind, *(f"{kind}:{i}" for i in range(1, num)))]
        raise UserError(f"--device {name}: this machine has {', '.join(known)}")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error


def devices_here() -> dict[str, int]:
    """Kinds of devices that this machine has, as torch calls them, and how many of each."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return {"cpu": 1} | ({} if found is None else {found.type: torch.accelerator.device_count()})
