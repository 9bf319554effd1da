"""Send thousands of mutated MIDI files and hand-made odd ones through `dsmr prepare`, among good ones.

    python tests/trials/midi.py [--short] [--output FILE.json] [--root FOLDER]

Files come from generated pieces, and from MAESTRO if `DSMR_MAESTRO` names its zip. Every file must be kept completely
or refused with a reason, good files must be kept unchanged, and time and memory are bounded.
"""

import json
import math
import os
import random
import resource
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

from processes import in_process, last_line, run
from symusic import ControlChange, Note, Score, Tempo, Track

from dsmr.cli import main
from dsmr.data.folder import MidiFiles
from dsmr.data.midi import MAX_NOTES, MAX_SECONDS
from dsmr.data.preparation import _tokenize
from dsmr.data.store import TokenStore
from dsmr.data.tokenizer import TokenizerSpec
from dsmr.data.vocabulary import BOS, EOS

SHORT, LONG, BATCH = 500, 10_000, 2_500
SLOWEST_SECONDS = 10.0
MOST_GIB = 4.0
END = b"\x00\xff\x2f\x00"


def length(number: int) -> bytes:
    """Encode a number with variable length, as MIDI does for time."""
    digits = [number & 0x7F]
    while number := number >> 7:
        digits.append(0x80 | number & 0x7F)
    return bytes(reversed(digits))


def on(wait: int, pitch: int = 60, velocity: int = 64, channel: int = 0) -> bytes:
    """Encode a note-on."""
    return length(wait) + bytes((0x90 | channel, pitch, velocity))


def off(wait: int, pitch: int = 60, channel: int = 0) -> bytes:
    """Encode a note-off."""
    return length(wait) + bytes((0x80 | channel, pitch, 0))


def tempo(wait: int, microseconds: int) -> bytes:
    """Encode a tempo in microseconds per beat."""
    return length(wait) + b"\xff\x51\x03" + struct.pack(">I", microseconds)[1:]


def midi(*tracks: bytes, division: int = 480, kind: int = 1, count: int | None = None, header: int = 6) -> bytes:
    """Encode a file of tracks, with a header that may be wrong."""
    chunks = b"".join(b"MTrk" + struct.pack(">I", len(track)) + track for track in tracks)
    return b"MThd" + struct.pack(">IHHH", header, kind, len(tracks) if count is None else count, division) + chunks


def many_notes(count: int) -> bytes:
    """Encode notes that run over all pitches."""
    return b"".join(on(1, number % 128) + off(0, number % 128) for number in range(count))


NOTES = b"".join(on(0, 60 + i) + off(240, 60 + i) for i in range(8))
WHOLE = midi(NOTES + END)
ODD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "refused"),
    "text": (b"This is no music at all, but a line of text.", "refused"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(200), "refused"),
    "header only": (midi(), "refused: no notes"),
    "no tracks": (midi(NOTES + END, count=0), "refused: no notes"),
    "no notes": (midi(tempo(0, 500_000) + END), "refused: no notes"),
    "drums only": (midi(on(0, 36, 64, 9) + off(240, 36, 9) + END), "refused: no piano notes"),
    "strings only": (midi(b"\x00\xc0\x30" + NOTES + END), "refused: no piano notes"),
    "format 0": (midi(NOTES + END, kind=0), "kept"),
    "format 1": (midi(tempo(0, 400_000) + END, NOTES + END), "kept"),
    "format 2": (midi(NOTES + END, NOTES + END, kind=2), "refused: is of MIDI format 2"),
    "format 9": (midi(NOTES + END, kind=9), "refused"),
    "SMPTE time": (midi(NOTES + END, division=0xE728), "refused"),
    "no ticks in a beat": (midi(NOTES + END, division=0), "refused: has no ticks"),
    "header says 500 tracks": (midi(NOTES + END, count=500), "kept"),
    "header says 600 bytes": (midi(NOTES + END, header=600), "refused"),
    "track says it is longer": (WHOLE[:18] + struct.pack(">I", 1 << 20) + WHOLE[22:], "refused"),
    "track says it is shorter": (WHOLE[:18] + struct.pack(">I", 5) + WHOLE[22:], "refused"),
    "no end of track": (midi(NOTES), "kept"),
    "rubbish behind": (WHOLE + b"rubbish" * 9, "kept"),
    "another chunk": (WHOLE[:14] + b"XFIH" + struct.pack(">I", 4) + b"abcd" + WHOLE[14:], "kept"),
    "running status": (midi(b"\x00\x90\x3c\x40\x60\x3c\x00\x00\x3e\x40\x60\x3e\x00" + END), "kept"),
    "pitch of 200": (midi(b"\x00\x90\xc8\x40\x60\x80\xc8\x00" + END), "refused"),
    "overlapping": (midi(on(0) + on(100) + off(100) + off(100) + NOTES + END), "kept"),
    "zero length": (midi(on(0) + off(0) + NOTES + END), "kept"),
    "never ending": (midi(on(0, 90) + NOTES + END), "kept: 1 unended"),
    "nothing ends": (midi(b"".join(on(100, 60 + i) for i in range(20)) + END), "refused"),
    "ends before it begins": (midi(off(0) + NOTES + END), "kept"),
    "tempo changes": (midi(b"".join(tempo(9, 200_000 + 9 * i) for i in range(5_000)) + NOTES + END), "kept"),
    "tempo of 0": (midi(tempo(0, 0) + NOTES + END), "refused: has a tempo of 0"),
    "slowest tempo": (midi(tempo(0, 0xFFFFFF) + NOTES + END), "kept"),
    "24 hours": (
        midi(b"".join(on(57_120 if i else 0) + off(480) for i in range(1440)) + END),
        "refused: longer than 4 hours",
    ),
    "one far-off note": (midi(NOTES + on(0x0FFFFFFF) + off(1) + END), "refused: longer than 4 hours"),
    "a million notes": (
        midi(b"".join(on(1, i % 128) + off(0, i % 128) for i in range(1_000_000)) + END),
        "refused: has",
    ),
    "as many notes as may be": (
        midi(b"".join(on(1, i % 128) + off(0, i % 128) for i in range(MAX_NOTES)) + END),
        "kept",
    ),
    "all at once": (
        midi(b"".join(on(0) for _ in range(9_999)) + b"".join(off(1) for _ in range(9_999)) + END),
        "kept",
    ),
    "a million pedals": (
        midi(NOTES + b"".join(bytes((1, 0xB0, 64, 127 * (i % 2))) for i in range(1_000_000)) + END),
        "kept",
    ),
    "twenty MiB": (midi(NOTES + b"\x00\xff\x01" + length(20 << 20) + bytes(20 << 20) + END), "refused: larger than"),
}


def good_pieces(count: int) -> list[bytes]:
    """Generate music with a pedal."""
    draw, made = random.Random(0), []
    for number in range(count):
        score, track, now = Score(480), Track("", 0, False), 0
        score.tempos.append(Tempo(0, 60 + 10 * number))
        for _ in range(120):
            now += draw.randrange(400)
            track.notes.append(Note(now, 1 + draw.randrange(900), draw.randrange(30, 100), draw.randrange(1, 128)))
            if draw.random() < 0.1:
                track.controls.append(ControlChange(now, 64, draw.choice((0, 127))))
        score.tracks.append(track)
        made.append(score.dumps_midi())
    return made


def real_pieces(count: int) -> list[bytes]:
    """Return pieces of MAESTRO, if it is available."""
    path = os.environ.get("DSMR_MAESTRO", "")
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".midi"))
        return [file.read(name) for name in names[:: len(names) // count][:count]]


def mutated(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """Change, cut, duplicate, insert or exchange some bytes of a file."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at, span = draw.randrange(len(changed) + 1), 1 + min(draw.randrange(1, 200), draw.randrange(1, 200))
        kind = draw.randrange(9)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[at : at + span] = draw.randbytes(span)
        elif kind == 2:
            del changed[at : at + span]
        elif kind == 3:
            changed[at:at] = draw.randbytes(span)
        elif kind == 4:
            changed[at:at] = changed[at : at + span]
        elif kind == 5:
            changed[at : at + span] = bytes([draw.choice((0x00, 0x7F, 0x80, 0xFF, 0x90, 0xF0))]) * span
        elif kind == 6 and draw.random() < 0.3:
            del changed[at:]
        elif kind == 7:
            field = draw.choice(((4, 4), (8, 2), (10, 2), (12, 2), (18, 4)))
            changed[field[0] : sum(field)] = draw.randbytes(field[1])
        else:
            changed[at : at + span] = other[at : at + span]
    return bytes(changed)


def prepare(folder: Path, found: Path) -> int:
    """Run `dsmr prepare` on a folder of which nearly everything may be refused."""
    options = ["--data.path", str(folder), "--data.max_refused_share", "1", "--output", str(found)]
    return main(["prepare", *options])


def batch(root: Path, files: dict[str, bytes], good: dict[str, bytes]) -> tuple[list[str], dict[str, Any], TokenStore]:
    """Prepare bad files among good ones; return failures, the command's result, and the store."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in {**files, **good}.items():
        (root / name).write_bytes(content)
    os.environ["DSMR_CACHE"] = str(root.parent / f"{root.name}-cache")
    found, log = root.parent / f"{root.name}.json", root.parent / f"{root.name}.log"
    status = in_process(lambda: prepare(root, found), log)
    if status:
        return [f"{root.name}: exit status {status}: {last_line(log)}"], {}, None  # type: ignore[return-value]
    result = json.loads(found.read_text())
    store = TokenStore(Path(result["store"]))
    kept = {piece.name: piece for piece in store.pieces}
    failures = [f"{name}: neither kept nor refused" for name in files if (name in kept) == (name in result["refused"])]
    failures += [
        f"{name}: refused without a reason" for name, reason in result["refused"].items() if not reason.strip()
    ]
    failures += [f"{name}: a good file was refused" for name in good if name not in kept]
    for piece in store.pieces:
        ids = store.tokens[piece.start : piece.start + piece.length]
        is_music = ids[0] == BOS and ids[-1] == EOS and ids.max() < 392 and not {BOS, EOS} & set(ids[1:-1].tolist())
        if not is_music or not 0 < piece.seconds <= MAX_SECONDS or not 0 < piece.num_notes <= MAX_NOTES:
            failures.append(f"{piece.name}: kept, but {piece}")
    return failures, result, store


def pieces_of(store: TokenStore, names: Any) -> dict[str, bytes]:
    """Return the tokens of pieces by name."""
    chosen = [piece for piece in store.pieces if piece.name in names]
    return {piece.name: store.tokens[piece.start : piece.start + piece.length].tobytes() for piece in chosen}


def mutants(root: Path, good: dict[str, bytes], alone: dict[str, bytes], *, short: bool) -> dict[str, Any]:
    """Prepare files with random changes, in batches."""
    draw = random.Random(3)
    seeds = [*good.values(), *real_pieces(4 if short else 40)]
    total, failures, kept = SHORT if short else LONG, [], 0
    began = time.monotonic()
    for first in range(0, total, BATCH):
        files = {
            f"mutant{number:05d}.mid": mutated(draw.choice(seeds), draw.choice(seeds), draw)
            for number in range(first, min(first + BATCH, total))
        }
        failed, _, store = batch(root / f"mutants{first}", files, good)
        failures += failed
        if store is not None:
            kept += len(store.pieces) - len(good)
            if pieces_of(store, good) != alone:
                failures.append(f"mutants{first}: good neighbours were changed")
    return {
        "cases": total,
        "of_real_pieces": bool(real_pieces(1)),
        "kept": kept,
        "refused": total - kept,
        "seconds": round(time.monotonic() - began, 1),
        "failures": failures,
    }


def odd_ones(root: Path, good: dict[str, bytes], alone: dict[str, bytes]) -> dict[str, Any]:
    """Prepare hand-made files with their expected outcome, and a folder and a pipe named like files."""
    files = {f"{name.replace(' ', '_')}.mid": content for name, (content, _) in ODD.items()}
    folder = root / "odd"
    (folder / "folder.mid").mkdir(parents=True)
    (folder / "folder.mid" / "inside.mid").write_bytes(WHOLE)
    os.mkfifo(folder / "pipe.mid")
    failures, result, store = batch(folder, files, good)
    if store is None:
        return {"cases": len(ODD), "failures": failures}
    if pieces_of(store, good) != alone:
        failures.append("good neighbours were changed")
    kept = {piece.name: piece for piece in store.pieces}
    outcomes = {}
    for name, (_, expected) in ODD.items():
        file = f"{name.replace(' ', '_')}.mid"
        outcome = f"refused: {result['refused'][file]}" if file in result["refused"] else "kept"
        if file in kept and kept[file].num_unended:
            outcome += f": {kept[file].num_unended} unended"
        outcomes[name] = outcome
        if not outcome.startswith(expected) or (expected == "kept" and outcome != "kept"):
            failures.append(f"{name}: {outcome}, not {expected}")
    for file in ("folder.mid", "pipe.mid"):
        if "not a regular file" not in result["refused"].get(file, ""):
            failures.append(f"{file}: {result['refused'].get(file)}")
    if "folder.mid/inside.mid" not in kept:
        failures.append("what lies in folder.mid was not kept")
    return {"cases": len(ODD) + 2, "outcomes": outcomes, "failures": failures}


def bounds(root: Path) -> dict[str, Any]:
    """Measure the seconds of each odd file, and the memory of all of them."""
    folder = root / "bounds"
    folder.mkdir()
    slowest = {}

    def measure() -> int:
        files, spec = MidiFiles(folder), TokenizerSpec()
        taken = {}
        for name, (content, _) in ODD.items():
            (folder / "file.mid").write_bytes(content)
            began = time.perf_counter()
            _tokenize(files, spec, "file.mid")
            taken[name] = time.perf_counter() - began
        name = max(taken, key=lambda key: taken[key])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        (root / "bounds.json").write_text(json.dumps({"file": name, "seconds": taken[name], "peak_gib": peak}))
        return 0

    in_process(measure, root / "bounds.log")
    slowest = json.loads((root / "bounds.json").read_text())
    failures = []
    if slowest["seconds"] > SLOWEST_SECONDS or slowest["peak_gib"] > MOST_GIB or math.isnan(slowest["peak_gib"]):
        failures.append(f"too slow or too large: {slowest}")
    return {"cases": len(ODD), "slowest": slowest, "failures": failures}


def work(root: Path, *, short: bool) -> dict[str, Any]:
    """Run all trials in a folder."""
    good = {f"good{number:02d}.mid": content for number, content in enumerate(good_pieces(12))}
    failures, _, store = batch(root / "alone", {}, good)
    if failures:
        raise SystemExit(failures[0])
    alone = pieces_of(store, good)
    return {
        "odd": odd_ones(root, good, alone),
        "bounds": bounds(root),
        "mutants": mutants(root, good, alone, short=short),
    }


if __name__ == "__main__":
    raise SystemExit(run(__doc__, work))
