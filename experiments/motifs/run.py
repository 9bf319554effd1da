"""Test whether memory points to motifs that return, on generated music where the returns are known.

    python experiments/motifs/run.py [--root runs/motifs] [--pieces 4096]

A piece is a single line of notes in sections, each longer than a segment, that come back in any order. A section
repeats its own two motifs of five to nine notes, with fresh notes between them; only these returns are predictable.
`dsmr fit` trains a small model on such pieces, then `dsmr analyze --piece` analyzes unseen ones. The score is how
well the nats saved by memory, note by note, separate motifs that were last heard more than a segment ago (from their
third note on, because the first two announce them) from fresh notes and from motifs heard within half a segment: the
area under the ROC curve, 0.5 for chance.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from symusic import Note, Score, Track

from dsmr.analyze.notes import minutes_seconds
from dsmr.benchmark.machine import current_commit, hardware_info, package_versions
from dsmr.cli import main as dsmr

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "motifs.yaml"
SEED = 0
TICKS_PER_QUARTER, TICKS_PER_NOTE = 50, 10  # of 10 ms
NUM_NOTES = 400
LOWEST, HIGHEST = 30, 78
SEGMENT = 192  # tokens, as in motifs.yaml
TOKENS_PER_NOTE = 3  # it begins, time passes, it ends
NUM_SECTIONS, NUM_MOTIFS = 3, 2  # of a piece, of a section
KNOWN = 2  # notes of a motif before it can be recognised
FAR, OTHER, UNSCORED = 1, 0, -1


@dataclass(frozen=True)
class Piece:
    """A line of notes.

    Attributes:
        pitch_N: MIDI pitch.
        label_N: FAR for notes of a motif that was last heard more than a segment ago, OTHER for fresh notes and
            motifs that lie within half a segment, UNSCORED for what is neither.
    """

    pitch_N: NDArray[np.int64]
    label_N: NDArray[np.int64]


def compose(rng: np.random.Generator) -> Piece:
    """Draw a piece of NUM_NOTES notes or a few more."""
    pitches = rng.permutation(np.arange(LOWEST, HIGHEST))  # no note belongs to two motifs
    sizes = rng.integers(5, 10, NUM_SECTIONS * NUM_MOTIFS)
    while sizes.sum() > len(pitches):
        sizes = rng.integers(5, 10, NUM_SECTIONS * NUM_MOTIFS)
    motifs = np.split(pitches, sizes.cumsum())
    line: list[int] = []
    label: list[int] = []
    last_heard: dict[int, int] = {}
    section, num_known = 0, 1
    while len(line) < NUM_NOTES:
        end = len(line) + int(rng.integers(SEGMENT, 3 * SEGMENT // 2)) // TOKENS_PER_NOTE
        while len(line) < end:
            if rng.random() < 0.25:
                fresh = rng.integers(LOWEST, HIGHEST, rng.integers(1, 4))
                line.extend(fresh.tolist())
                label.extend([OTHER] * len(fresh))
                continue
            number = section * NUM_MOTIFS + int(rng.integers(NUM_MOTIFS))
            motif = motifs[number].tolist()
            label.extend(labels(len(motif), len(line), last_heard.get(number)))
            last_heard[number] = len(line)
            line.extend(motif)
        if num_known < NUM_SECTIONS and rng.random() < 0.5:
            section, num_known = num_known, num_known + 1
        elif num_known > 1:
            section = int(rng.choice([other for other in range(num_known) if other != section]))
    return Piece(np.array(line), np.array(label))


def labels(size: int, start: int, last_heard: int | None) -> list[int]:
    """Return the labels of a motif's notes, given its start and the start of its last occurrence."""
    if last_heard is None:
        return [OTHER] * size
    if (start - last_heard - size) * TOKENS_PER_NOTE >= SEGMENT:
        found = FAR
    else:
        found = OTHER if (start + size - last_heard) * TOKENS_PER_NOTE <= SEGMENT // 2 else UNSCORED
    return [UNSCORED] * KNOWN + [found] * (size - KNOWN)


def write_midi(piece: Piece, path: Path) -> None:
    """Write a piece as a MIDI file."""
    score, track = Score(TICKS_PER_QUARTER), Track("", 0, False)
    for number, pitch in enumerate(piece.pitch_N.tolist()):
        track.notes.append(Note(TICKS_PER_NOTE * number, TICKS_PER_NOTE, pitch, 64))
    score.tracks.append(track)
    score.dump_midi(path)


def area(saved_N: NDArray[np.float64], label_N: NDArray[np.int64]) -> float | None:
    """Return the probability that a return has more saved nats than another note, or None without returns."""
    saved_N, is_far_N = saved_N[label_N != UNSCORED], label_N[label_N != UNSCORED] == FAR
    num = int(is_far_N.sum())
    if num == 0:
        return None
    ranks = rankdata(saved_N)[is_far_N].sum()
    return float((ranks - num * (num + 1) / 2) / (num * (len(saved_N) - num)))


def run(arguments: list[str]) -> None:
    print(f"\n$ dsmr {' '.join(arguments)}", flush=True)
    status = dsmr(arguments)
    if status:
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/motifs"))
    parser.add_argument("--pieces", type=int, default=4096, help="pieces to train on")
    parser.add_argument("--held-out", type=int, default=24, help="unseen pieces to analyze")
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args()
    midi, model = options.root / "midi", options.root / "model"
    midi.mkdir(parents=True, exist_ok=True)
    for number in range(options.pieces):
        write_midi(compose(np.random.default_rng([0, number])), midi / f"{number:05d}.mid")
    if (model / "last.ckpt").is_file():
        run(["fit", "--resume", str(model)])
    else:
        shutil.rmtree(model, ignore_errors=True)
        config = ["--config", str(CONFIG), "--data.path", str(midi)]
        run(["fit", *config, f"--seed_everything={SEED}", "--root", str(options.root), "--name", "model"])
    saved, label, areas = [], [], []
    for number in range(options.held_out):
        piece, path = compose(np.random.default_rng([1, number])), options.root / f"held-out-{number}.mid"
        write_midi(piece, path)
        output = path.with_suffix(".json")
        picture = ["--plot"] if number == 0 else []
        run(["analyze", "--checkpoint", str(model), "--piece", str(path), "--output", str(output), *picture])
        found = json.loads(output.read_text(encoding="utf-8"))["by_note"]
        assert found["pitch_N"] == piece.pitch_N.tolist()
        saved.append(np.array(found["saved_N"]))
        label.append(piece.label_N)
        areas.append(area(saved[-1], label[-1]))
        if number == 0:
            (options.output / "heard.png").write_bytes((model / "analysis" / f"{path.stem}.png").read_bytes())
            begins = np.flatnonzero(np.diff((piece.label_N == FAR).astype(int)) == 1) + 1 - KNOWN
            print("returns from far begin at", ", ".join(minutes_seconds(n * TICKS_PER_NOTE / 100) for n in begins))
    saved_N, label_N = np.concatenate(saved), np.concatenate(label)
    result = {
        "command": "python experiments/motifs/run.py",
        "commit": current_commit(),
        "config": CONFIG.name,
        "seed": SEED,
        "hardware": hardware_info(torch.device("cpu")),
        "versions": package_versions(),
        "pieces": options.held_out,
        "auc": area(saved_N, label_N),
        "auc_by_piece": areas,
        "notes": {"returns": int((label_N == FAR).sum()), "others": int((label_N == OTHER).sum())},
        "nats_saved_per_note": {
            "returns": float(saved_N[label_N == FAR].mean()),
            "others": float(saved_N[label_N == OTHER].mean()),
        },
    }
    (options.output / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
