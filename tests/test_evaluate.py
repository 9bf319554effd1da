"""Figures of music: known answers, and the reference against itself."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from symusic import Note, Score, TextMeta, Track

from conftest import write_midi
from dsmr.cli import main
from dsmr.data.tokenizer import Performance, TokenizerSpec, build_tokenizer
from dsmr.evaluate.compare import HALVES, REFERENCE, compare, describe, evaluate, table
from dsmr.evaluate.copying import longest_shared
from dsmr.evaluate.excerpts import Excerpt, read_excerpt, read_generated, stretch
from dsmr.evaluate.features import QUANTITIES, divergence, histogram, overlap_area, windows
from dsmr.generate.music import SEAM


@pytest.fixture
def tokenizer() -> Performance:
    made = build_tokenizer(TokenizerSpec())
    assert isinstance(made, Performance)
    return made


def excerpt(*notes: tuple[float, float, int, int], seconds: float = 10.0) -> Excerpt:
    """Of notes (onset in seconds, duration, pitch, velocity)."""
    onset, duration, pitch, velocity = (np.array(column) for column in zip(*notes, strict=True))
    ticks = (np.rint(100 * part).astype(np.int64) for part in (onset, duration))
    return Excerpt("x", seconds, *ticks, pitch.astype(np.int64), velocity.astype(np.int64))


def test_windows_of_time_have_known_figures() -> None:
    # four pitch classes alike in the first five seconds, one in the second five
    chord = [(0.0, 2.0, 60, 70), (0.0, 2.0, 64, 70), (0.0, 1.0, 67, 70), (1.0, 1.0, 70, 70)]
    found = windows([excerpt(*chord, (5.0, 9.0, 60, 70))], 5.0)
    assert [one.pitch_class_entropy for one in found] == pytest.approx([2.0, 0.0])
    assert [one.density for one in found] == pytest.approx([0.8, 0.2])
    assert [one.polyphony for one in found] == pytest.approx([3.0, 1.0])
    assert len(windows([excerpt(*chord, seconds=9.9)], 5.0)) == 1, "windows are whole"
    assert windows([excerpt((7.0, 1.0, 60, 70))], 5.0)[0].density == pytest.approx(0.2), "silence is no window"


def test_histograms_have_known_bins_and_lose_no_note() -> None:
    piece = excerpt((0.0, 0.01, 0, 1), (0.0, 50.0, 127, 127), (0.01, 1.0, 60, 64), (9.0, 1.0, 60, 64))
    for name, quantity in QUANTITIES.items():
        assert histogram([piece], quantity).sum() == (3 if name == "inter_onset" else 4)
    assert histogram([piece], QUANTITIES["pitch"])[[0, 60, 127]].tolist() == [1, 2, 1]
    gaps, edges = histogram([piece], QUANTITIES["inter_onset"]), QUANTITIES["inter_onset"].edges
    places = [int(np.flatnonzero((edges[:-1] <= gap) & (gap < edges[1:]))[0]) for gap in (0.0, 0.01, 8.99)]
    assert len(set(places)) == 3
    assert gaps[places].tolist() == [1, 1, 1]


def test_overlap_and_divergence_have_known_values() -> None:
    first, second = np.array([10.0, 0.0, 30.0]), np.array([0.0, 20.0, 20.0])
    assert overlap_area(first, second) == pytest.approx(0.5)
    assert overlap_area(first, 3 * first) == pytest.approx(1.0)
    assert divergence(first, first) == pytest.approx(0.0)
    p, q = (first + 0.5) / 41.5, (second + 0.5) / 41.5
    assert divergence(first, second) == pytest.approx(float((p * np.log(p / q)).sum()))
    assert math.isfinite(divergence(np.array([5.0, 0.0]), np.array([0.0, 5.0])))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_longest_shared_run_is_found(transposed: bool) -> None:
    draws = np.random.default_rng(0)
    corpus = [draws.integers(21, 109, size) for size in (400, 3, 900)]
    copied = draws.integers(21, 109, 300)
    copied[100:137] = corpus[2][500:537] + (5 if transposed else 0)
    across = np.concatenate([corpus[0][-20:], corpus[1][:20]])  # runs that cross two pieces are two runs
    fresh = np.full(50, 5)
    found = longest_shared([copied, across, fresh, np.empty(0, np.int64)], corpus, transposed=transposed)
    assert found == [37, 20, 2 if transposed else 0, 0]  # a repeated note is a run of any key
    if not transposed:
        assert longest_shared([copied + 1], corpus)[0] < 5
    assert longest_shared([corpus[0]], corpus, transposed=transposed) == [400]


def test_only_what_comes_after_the_seam_is_judged(tokenizer: Performance, tmp_path: Path) -> None:
    score = Score(480)
    score.tracks.append(Track("", 0, False))
    score.tracks[0].notes.extend([Note(960 * second, 480, 60 + second, 70) for second in range(8)])
    score.markers.append(TextMeta(960 * 3, SEAM))
    score.dump_midi(tmp_path / "a.mid")
    found = read_excerpt(tokenizer, tmp_path / "a.mid", "a")
    assert (found.start, found.seconds, found.invalid) == (3.0, 4.5, 0)
    assert found.pitch.tolist() == [63, 64, 65, 66, 67]
    assert found.onset.tolist() == [0, 100, 200, 300, 400]
    part = stretch(found, 100, 200)
    assert part.pitch.tolist() == [64, 65]
    assert part.start == 1.0


def test_events_that_are_no_music_are_counted(tokenizer: Performance, tmp_path: Path) -> None:
    events = b"\x00\x90\x3c\x40\x60\x90\x3c\x40\x60\x80\x3c\x40\x60\x80\x3c\x40\x00\x90\x3e\x40\x00\xff\x2f\x00"
    head = b"MThd\x00\x00\x00\x06\x00\x00\x00\x01\x00\x60MTrk" + len(events).to_bytes(4, "big")
    (tmp_path / "a.mid").write_bytes(head + events)  # one strike while it sounds, one that never ends
    write_midi(tmp_path / "b.mid", 0)
    found, refused = read_generated(tokenizer, tmp_path)
    assert refused == {}
    assert found[0].invalid == 2


def test_rows_compare_with_the_reference(tokenizer: Performance, tmp_path: Path) -> None:
    for number in range(6):
        write_midi(tmp_path / "real" / f"{number}.mid", number)
        write_midi(tmp_path / "same" / f"{number}.mid", number)
    high = excerpt(*[(0.1 * i, 0.1, 100, 120) for i in range(60)])
    real, _ = read_generated(tokenizer, tmp_path / "real")
    same, _ = read_generated(tokenizer, tmp_path / "same")
    rows = evaluate({"same": same, "high": [high]}, real, 2.0, [one.pitch for one in real])
    assert list(rows) == [REFERENCE, HALVES, "same", "high"]
    for quantity in QUANTITIES:
        assert rows["same"]["against_reference"][quantity]["overlap"] == pytest.approx(1.0)
        assert rows["same"]["against_reference"][quantity]["kl"] == pytest.approx(0.0, abs=1e-9)
        assert rows["high"]["against_reference"][quantity]["overlap"] < 0.5
    assert rows["same"]["longest_shared_run"]["median"] == 60
    assert rows["high"]["longest_shared_run"]["max"] <= 2
    lines = table(rows)
    assert len(lines) == 6
    assert len({line.count("|") for line in lines}) == 1
    assert compare(rows["same"], rows["same"])["pitch"]["overlap"] == pytest.approx(1.0)
    assert "longest_shared_run" not in describe(real, 2.0, ())


@pytest.mark.filterwarnings("ignore:.*instantiate_classes.*")
def test_the_command_writes_table_picture_and_figures(
    midi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSMR_CACHE", str(tmp_path / "cache"))
    write_midi(tmp_path / "made" / "one.mid", 50)
    (tmp_path / "made" / "broken.mid").write_bytes(b"MThd and no more")
    options = ["--data.path", str(midi_folder), "--window", "2", "--output", str(tmp_path / "out")]
    arguments = ["evaluate", str(tmp_path / "made"), str(midi_folder / "deep"), "--split", "train", "--json", *options]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "evaluation.md", "evaluation.json", "evaluation.png"
    }  # fmt: skip
    assert list(result["rows"])[2:] == [str(tmp_path / "made"), str(midi_folder / "deep")]
    assert result["rows"][str(midi_folder / "deep")]["longest_shared_run"]["max"] == 60, "training pieces themselves"
    assert "broken.mid: not a MIDI file" in printed
    for bad, message in (
        ([str(tmp_path / "nowhere")], "is no folder"),
        ([str(tmp_path / "cache")], "holds no MIDI file"),
        ([str(tmp_path / "made"), "--split", "trains"], "not one of"),
        ([str(tmp_path / "made"), "--window", "0"], "must be above 0"),
        ([str(tmp_path / "made"), "--window", "500", "--data.path", str(midi_folder)], "not longer"),
    ):
        assert main(["evaluate", *bad]) == 2
        assert message in capsys.readouterr().err
