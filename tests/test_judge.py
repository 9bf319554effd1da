"""Metrics of generated music: known answers, and the reference against itself."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from symusic import Note, Score, TextMeta, Track

from conftest import write_midi
from dsmr.analyze.judging.copying import longest_shared
from dsmr.analyze.judging.excerpts import Excerpt, read_excerpt, read_generated, stretch
from dsmr.analyze.judging.features import QUANTITIES, divergence, histogram, overlap_area, time_windows
from dsmr.analyze.judging.music_comparison import (
    FEWEST,
    REFERENCE,
    compare_histograms,
    compare_sets,
    judgement_table,
    set_metrics,
)
from dsmr.cli import main
from dsmr.data.performance import Performance
from dsmr.data.tokenizer import TokenizerSpec, build_tokenizer
from dsmr.generate.music import SEAM_MARKER


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


def test_windows_of_time_have_known_metrics() -> None:
    # four pitch classes alike in the first five seconds, one in the second five
    chord = [(0.0, 2.0, 60, 70), (0.0, 2.0, 64, 70), (0.0, 1.0, 67, 70), (1.0, 1.0, 70, 70)]
    found = time_windows([excerpt(*chord, (5.0, 9.0, 60, 70))], 5.0)
    assert [one.pitch_class_entropy for one in found] == pytest.approx([2.0, 0.0])
    assert [one.density for one in found] == pytest.approx([0.8, 0.2])
    assert [one.polyphony for one in found] == pytest.approx([3.0, 1.0])
    assert len(time_windows([excerpt(*chord, seconds=9.9)], 5.0)) == 1, "windows are whole"
    assert time_windows([excerpt((7.0, 1.0, 60, 70))], 5.0)[0].density == pytest.approx(0.2), "silence is no window"


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
    score.markers.append(TextMeta(960 * 3, SEAM_MARKER))
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
    for number in range(FEWEST):
        write_midi(tmp_path / "real" / f"{number}.mid", number)
    for number in range(100, 106):
        write_midi(tmp_path / "same" / f"{number}.mid", number)
    high = excerpt(*[(0.1 * i, 0.1, 100, 120) for i in range(60)])
    real, _ = read_generated(tokenizer, tmp_path / "real")
    same, _ = read_generated(tokenizer, tmp_path / "same")
    rows = compare_sets({"same": same, "high": [high]}, real, 2.0, [one.pitch for one in real])
    assert list(rows) == [REFERENCE, "same", "high"]
    for quantity in QUANTITIES:
        same_one, high_one = (rows[name]["against_reference"][quantity] for name in ("same", "high"))
        assert (same_one["floor"]["excerpts"], same_one["floor"]["rest"]) == (6, FEWEST - 6)
        assert same_one["overlap"] == pytest.approx(same_one["floor"]["overlap"]["mean"], abs=0.05)
        assert high_one["floor"]["excerpts"] == 1
        assert high_one["overlap"] < min(0.5, high_one["floor"]["overlap"]["low"])
        assert high_one["kl"] > high_one["floor"]["kl"]["high"]
    assert rows["high"]["longest_shared_run"]["max"] <= 2
    lines = judgement_table(rows)
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        *(REFERENCE, "same", "as many real ones", "high", "as many real ones")
    ]
    assert [line.split("|")[2].strip() for line in lines[2:]] == [f"{FEWEST}", "6", "6", "1", "1"]
    assert len({line.count("|") for line in lines}) == 1
    assert "longest_shared_run" not in set_metrics(real, 2.0, ())
    rows = compare_sets({"same": same}, real[1:], 2.0, [one.pitch for one in real])
    assert "against_reference" not in rows["same"], "too few real ones to tell what they reach"
    assert rows["same"]["longest_shared_run"]["max"] < 60
    assert len(judgement_table(rows)) == 4


def counted(draws: np.random.Generator, num: int, *, notes: float = 200, lowest: float = 16) -> dict[str, np.ndarray]:
    """Histograms of excerpts, each with a register of its own: its notes are more alike than those of all."""
    centre_N1 = draws.uniform(lowest, lowest + 16, (num, 1))
    weight_NB = np.exp(-((np.arange(48) - centre_N1) ** 2) / 18) + 1e-4
    size_N = draws.poisson(notes * draws.lognormal(0, 0.5, num)) + 2
    parts = zip(size_N, weight_NB / weight_NB.sum(axis=1, keepdims=True), strict=True)
    return {"pitch": np.stack([draws.multinomial(size, shares) for size, shares in parts]).astype(float)}


@pytest.mark.parametrize(("num", "notes"), [(4, 200), (4, 800), (20, 200), (20, 800), (80, 200)])
def test_real_excerpts_lie_within_their_floor_however_many_they_are(num: int, notes: int) -> None:
    found = []
    for seed in range(200):
        draws = np.random.default_rng(seed)
        found.append(compare_histograms(counted(draws, num, notes=notes), counted(draws, 60))["pitch"])
    assert {one["floor"]["excerpts"] for one in found} == {min(num, 30)}
    # 2.5 % are expected on each side
    assert np.mean([one["overlap"] < one["floor"]["overlap"]["low"] for one in found]) < 0.06
    assert np.mean([one["kl"] > one["floor"]["kl"]["high"] for one in found]) < 0.06
    assert np.mean([one["overlap"] > one["floor"]["overlap"]["high"] for one in found]) < 0.08
    bias = np.mean([one["overlap"] - one["floor"]["overlap"]["mean"] for one in found])
    assert bias == pytest.approx(0, abs=0.012)


@pytest.mark.parametrize("num", [4, 20, 80])
def test_other_music_lies_outside_of_its_floor(num: int) -> None:
    found = []
    for seed in range(20):
        draws = np.random.default_rng(seed)
        one = compare_histograms(counted(draws, num, lowest=24), counted(draws, 60))["pitch"]
        found.append(one["overlap"] < one["floor"]["overlap"]["low"] and one["kl"] > one["floor"]["kl"]["high"])
    assert np.mean(found) >= {4: 0.5, 20: 1, 80: 1}[num]


def test_fewer_excerpts_have_a_lower_and_wider_floor_and_one_seed_draws_alike() -> None:
    draws = np.random.default_rng(0)
    real = counted(draws, 60)
    floors = [compare_histograms(counted(draws, num), real)["pitch"]["floor"]["overlap"] for num in (1, 4, 12, 30)]
    assert all(few["mean"] < many["mean"] - 0.01 for few, many in pairwise(floors))
    assert floors[3]["high"] - floors[3]["low"] < 0.5 * (floors[1]["high"] - floors[1]["low"])
    made = counted(draws, 4)
    assert compare_histograms(made, real) == compare_histograms(made, real)
    gapless = {"pitch": made["pitch"], "inter_onset": np.zeros((4, 3))}
    assert set(compare_histograms(gapless, {"pitch": real["pitch"], "inter_onset": np.ones((60, 3))})) == {"pitch"}
    some = np.ones((60, 3)) * (np.arange(60) > 0)[:, None]  # a real excerpt of one note has no gap between notes
    (found,) = compare_histograms({"inter_onset": np.ones((1, 3))}, {"inter_onset": some}).values()
    assert found["floor"]["overlap"] == {"mean": 1, "low": 1, "high": 1}


@pytest.mark.filterwarnings("ignore:.*instantiate_classes.*")
def test_the_command_writes_table_picture_and_figures(
    midi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSMR_CACHE", str(tmp_path / "cache"))
    write_midi(tmp_path / "made" / "one.mid", 50)
    (tmp_path / "made" / "broken.mid").write_bytes(b"MThd and no more")
    options = ["--data.path", str(midi_folder), "--window", "2", "--output", str(tmp_path / "out")]
    arguments = ["judge", str(tmp_path / "made"), str(midi_folder / "deep"), "--split", "train", "--json", *options]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "evaluation.md", "evaluation.json", "evaluation.png"
    }  # fmt: skip
    assert list(result["rows"])[1:] == [str(tmp_path / "made"), str(midi_folder / "deep")]
    assert result["rows"][str(midi_folder / "deep")]["longest_shared_run"]["max"] == 60, "training pieces themselves"
    assert "broken.mid: not a MIDI file" in printed
    assert result["not_compared"] in printed, "a dozen pieces are too few to tell what as many real ones reach"
    assert not any("against_reference" in row for row in result["rows"].values())
    for bad, message in (
        ([str(tmp_path / "nowhere")], "is not a folder"),
        ([str(tmp_path / "cache")], "holds no MIDI file"),
        ([str(tmp_path / "made"), "--split", "trains"], "not one of"),
        ([str(tmp_path / "made"), "--window", "0"], "must be above 0"),
        ([str(tmp_path / "made"), "--window", "500", "--data.path", str(midi_folder)], "no longer than that"),
    ):
        assert main(["judge", *bad]) == 2
        assert message in capsys.readouterr().err
