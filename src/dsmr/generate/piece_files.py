"""Prompts of many pieces, and the files to which their continuations are written."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from symusic import Score

from dsmr import UserError
from dsmr.data.datamodule import MusicData
from dsmr.data.files import atomic_write
from dsmr.data.folder import MidiFiles
from dsmr.data.performance import Performance
from dsmr.data.sources import Split
from dsmr.data.tokenizer import decode, open_ended
from dsmr.generate.audio import render_audio
from dsmr.generate.continuations import Continuation
from dsmr.generate.generator import Generator
from dsmr.generate.piano_roll import plot_piano_roll
from dsmr.generate.prompt import Prompt, cut_prompt


@dataclass
class Prompts:
    """Prompts by name, read one at a time; `refused` has the reasons of those that could not be used so far."""

    names: Sequence[str]
    read: Callable[[str], Prompt] = field(repr=False)
    refused: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, Prompt]]:
        for name in self.names:
            try:
                prompt = self.read(name)
            except UserError as error:
                self.refused[name] = str(error)
                continue
            yield name, prompt


def folder_prompts(generator: Generator, folder: Path, seconds: float | None) -> Prompts:
    """The beginning of every MIDI file in a folder and the folders below it; at least one."""
    names = MidiFiles(folder).names()
    if not names:
        raise UserError(f"--prompt {folder} holds no MIDI file; name a folder that has some")
    return Prompts(names, lambda name: generator.prompt(folder / name, seconds))


def split_prompts(data: MusicData, split: Split, seconds: float | None) -> Prompts:
    """The beginning of every piece of a split, as the token store has it; at least one."""
    numbers = {data.store.pieces[number].name: number for number in data.pieces(split)}

    def read(name: str) -> Prompt:
        piece, tokenizer = data.store.pieces[numbers[name]], data.tokenizer
        ids = open_ended(tokenizer, data.store.tokens[piece.start : piece.start + piece.length].tolist())
        if isinstance(tokenizer, Performance):
            return cut_prompt(tokenizer, ids, seconds, name)
        if seconds is not None:  # these tokens do not tell their time one by one: the data's mean decides
            ids = ids[: 1 + round(seconds * data.tokens_per_second)]
        return Prompt(ids, seam=float(decode(tokenizer, ids[1:]).to("second").end()))

    return Prompts(list(numbers), read)


def output_files(folder: Path, names: Sequence[str], num: int) -> dict[str, list[Path]]:
    """Files in a folder for `num` continuations of each piece: `NAME.mid`, or `NAME-1.mid`, `NAME-2.mid`, ...

    Pieces of different folders that share a file name keep the names of their folders: `a-NAME.mid`, `b-NAME.mid`.
    Raises `UserError` if two pieces would still be written to one file.
    """
    stems = {name: Path(name).stem for name in names}
    counts = Counter(stems.values())
    stems |= {name: "-".join(Path(name).with_suffix("").parts) for name, stem in stems.items() if counts[stem] > 1}
    twice = [stem for stem, count in Counter(stems.values()).items() if count > 1]
    if twice:
        raise UserError(f"several prompts would be continued in {folder / twice[0]}.mid; give them different names")
    return {name: numbered(folder / f"{stem}.mid", num) for name, stem in stems.items()}


def numbered(path: Path, num: int) -> list[Path]:
    """The path itself for one piece, `NAME-1`, `NAME-2`, ... for more."""
    return [path] if num == 1 else [path.with_stem(f"{path.stem}-{number}") for number in range(1, num + 1)]


def write_continuation(
    one: Continuation, path: Path, prompt: Prompt, sound_font: Path | None = None, *, picture: bool = False
) -> dict[str, Any]:
    """Write a continuation as MIDI, with a sound font also as WAV, and optionally as a piano roll (PNG).

    Returns the paths of the files, the number of new notes, seconds of new music, and if the model ended the piece.
    """
    content = one.score.dumps_midi()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(content)
        files: dict[str, Any] = {"output": str(path)}
        if sound_font is not None:
            files["audio"] = str(path.with_suffix(".wav"))
            render_audio(path, path.with_suffix(".wav"), sound_font)
        if picture:
            files["picture"] = str(path.with_suffix(".png"))
            seam = prompt.seam if prompt.score is not None else None
            plot_piano_roll(Score.from_midi(content), path.with_suffix(".png"), title=path.stem, seam=seam)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error})") from error
    notes = one.score.to("second").tracks[0].notes if one.score.tracks else ()
    num_new = sum(note.time >= prompt.seam - 0.005 for note in notes)  # half a tick of slack, as in the piano roll
    return files | {"notes": num_new, "music_seconds": one.seconds, "has_ended": one.has_ended}
