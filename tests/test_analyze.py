"""`dsmr analyze`: what is measured of attention and memory, held against what must be so."""

import csv
import json
import shutil
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from conftest import tiny_transformer, write_midi
from dsmr.analyze.distances import AttentionDistances, attention_weights
from dsmr.analyze.layers import ablated_horizons, analyze_memory, check_layers, memory_savings
from dsmr.analyze.notes import NoteSavings, note_savings, remembered_passages
from dsmr.analyze.streams import piece_nll, score_pieces, window_nll
from dsmr.analyze.suggest import check_budget, half_budget, suggest_horizons
from dsmr.attention.backends import attend
from dsmr.cli import main
from dsmr.cli.lightning_cli import QUIET
from dsmr.cli.outcome import is_as_in_training
from dsmr.data.datamodule import MusicData
from dsmr.data.midi import read_midi
from dsmr.data.performance import Performance
from dsmr.data.synthetic import RecallTask
from dsmr.data.tokenizer import TokenizerSpec, build_tokenizer, encode
from dsmr.results.bootstrap import NO_INTERVAL
from dsmr.results.piece_table import PieceTable
from dsmr.share.export import export_model
from dsmr.share.loading import load_model
from test_pieces import table


@pytest.fixture(autouse=True)
def lightnings_own_warnings() -> None:
    """Keep the program's own filters inside a test."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)


def recall_data(cache: Path) -> MusicData:
    task = RecallTask(distances=(64, 96), num_train=2, num_validation=3)
    return MusicData(recall=task, segment_length=8, num_lanes=2, transpose=0, cache_dir=str(cache))


@pytest.mark.parametrize("rule", ["boundary", "sliding"])
def test_attention_without_a_preference_falls_where_the_rule_says(rule: str, tmp_path: Path) -> None:
    model = tiny_transformer("1x16+1x4+1x0", vocab_size=392, rule=rule)
    for block in model.blocks:
        block.query_key_value.weight.data[:16] = 0  # queries: every key that is seen gets the same weight
    watched = AttentionDistances(model, 16 + 8)
    data = recall_data(tmp_path)
    with watched.watching():
        score_pieces(model, data, watch=watched.watch)
    assert watched.starts == (0, 1, 2, 4, 8, 16)
    lengths = [data.store.pieces[number].length - 1 for number in data.pieces("validation")]
    wanted, memory = np.zeros((3, 6)), np.zeros(3)
    for length in lengths:
        for position in range(length):
            place = position % 8
            for layer, horizon in enumerate((16, 4, 0)):
                first = max(position - place - horizon, 0)
                if rule == "sliding" and horizon:
                    first = max(position - horizon + 1, 0)
                back = np.arange(0, position - first + 1)
                classes = np.searchsorted(watched.starts, back, side="right") - 1
                wanted[layer] += np.bincount(classes, minlength=6) / len(back)
                memory[layer] += (back > place).mean()
    shares = watched.shares().numpy()
    assert watched.num_queries == sum(lengths)
    np.testing.assert_allclose(shares.sum(axis=-1), 1, rtol=1e-9)
    for head in range(2):
        np.testing.assert_allclose(shares[:, head], wanted / sum(lengths), rtol=1e-9)
        np.testing.assert_allclose(watched.memory_shares()[:, head], memory / sum(lengths), rtol=1e-9)


@pytest.mark.parametrize("rule", ["boundary", "sliding"])
@pytest.mark.parametrize("memory_gate", [None, -1.0])
def test_the_weights_that_are_counted_are_those_that_attend(
    memory_gate: float | None, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"d_model": 32, "num_heads": 4, "num_kv_heads": 2, "memory_gate": memory_gate, "rule": rule}
    model = tiny_transformer("1x16+1x4+1x0", vocab_size=392, **sizes)
    for block in model.blocks if memory_gate is not None else ():
        torch.nn.init.normal_(block.memory_gate, std=2.0)
    counted, attended = [], []

    def weigh(*arguments: object) -> torch.Tensor:
        counted.append(attention_weights(*arguments))
        return counted[-1]

    def look(query, key, value, past, *rest: object) -> torch.Tensor:
        attended.append((torch.cat([past.value, value], dim=2), attend(query, key, value, past, *rest)))
        return attended[-1][1]

    monkeypatch.setattr("dsmr.analyze.distances.attention_weights", weigh)
    monkeypatch.setattr("dsmr.analyze.distances.QUERIES_AT_ONCE", 4)  # two stretches of a segment of 8
    monkeypatch.setattr("dsmr.model.blocks.attend", look)
    watched = AttentionDistances(model, 16 + 8)
    with watched.watching():
        score_pieces(model, recall_data(tmp_path), watch=watched.watch)
    assert len(counted) == 2 * len(attended) > 2 * 3
    for number, (value_BKSD, wanted_BHTD) in enumerate(attended):
        weights_BHTS = torch.cat(counted[2 * number : 2 * number + 2], dim=2)
        torch.testing.assert_close(weights_BHTS @ value_BKSD.repeat_interleave(2, dim=1), wanted_BHTD)


def test_watching_changes_no_result_and_ends(tmp_path: Path) -> None:
    model, data = tiny_transformer("1x16+1x4+1x0", vocab_size=392), recall_data(tmp_path)
    plain = score_pieces(model, data)
    watched = AttentionDistances(model, 24)
    with watched.watching():
        seen = score_pieces(model, data, watch=watched.watch)
    np.testing.assert_array_equal(seen.nll_PF, plain.nll_PF)
    before = watched.mass_LHN.clone()
    score_pieces(model, data)
    assert torch.equal(before, watched.mass_LHN)
    assert watched.shares()[2].sum() == pytest.approx(2)


def test_a_memory_that_is_taken_away_is_that_of_other_horizons(tmp_path: Path) -> None:
    model, data = tiny_transformer("1x16+1x4+1x0", vocab_size=392), recall_data(tmp_path)
    assert ablated_horizons((16, 4, 0)) == {"0": (0, 4, 0), "1": (16, 0, 0), "all": (0, 0, 0)}
    without = {}
    for name, horizons in ablated_horizons(model.horizons).items():
        without[name] = score_pieces(model, data, horizons=horizons)
        own = tiny_transformer("+".join(f"1x{h}" for h in horizons), vocab_size=392)
        own.load_state_dict(model.state_dict())
        np.testing.assert_allclose(without[name].nll_PF, score_pieces(own, data).nll_PF, rtol=1e-9)
    assert model.horizons == (16, 4, 0)
    whole = score_pieces(model, data)
    saved = memory_savings(whole, without)["all"].difference.value
    assert saved == pytest.approx((without["all"].nll_P - whole.nll_P).sum() / whole.notes_P.sum())
    with pytest.raises(ValueError, match="keeps no memory"):
        check_layers(tiny_transformer("3x0"))
    with pytest.raises(ValueError, match="multiple"), model.remembering((3, 0, 0)):
        pass
    assert model.horizons == (16, 4, 0)


def test_a_piece_alone_has_the_nats_that_it_has_in_a_lane(midi_folder: Path, tmp_path: Path) -> None:
    data = MusicData(str(midi_folder), segment_length=8, num_lanes=2, transpose=0, cache_dir=str(tmp_path / "cache"))
    model = tiny_transformer("1x16+1x4+1x0", vocab_size=data.vocab_size)
    whole = score_pieces(model, data)
    for number in data.pieces("validation"):
        piece = data.store.pieces[number]
        ids = data.store.tokens[piece.start : piece.start + piece.length].astype(np.int64)
        nll_N = piece_nll(model, torch.from_numpy(ids))
        assert len(nll_N) == piece.length - 1
        assert float(nll_N.sum()) == pytest.approx(whole.nll_P[whole.names.index(piece.name)])


def test_windows_give_every_token_half_a_segment_and_no_memory() -> None:
    model = tiny_transformer("1x16+1x4+1x0")
    ids_N = torch.randint(0, 11, (60,), generator=torch.Generator().manual_seed(0))
    windows_N, memory_N = window_nll(model, ids_N), piece_nll(model, ids_N)
    torch.testing.assert_close(windows_N[:8], memory_N[:8])
    for token in (8, 13, 35, 58):
        first = token // 4 * 4 - 4  # the window whose second half it lies in
        with torch.no_grad(), model.remembering((0, 0, 0)):
            logits_BTV, _ = model(ids_N[None, first : first + 8], model.init_memory(1))
        wanted = -logits_BTV[0].log_softmax(-1)[token - first, ids_N[token + 1]]
        assert windows_N[token] == pytest.approx(float(wanted))
    assert len(windows_N) == 59
    for length in (1, 2, 7, 8, 9, 12, 13, 17):
        part = window_nll(model, ids_N[: length + 1])
        assert len(part) == length
        assert (part > 0).all()


def loss(worth: list[dict[int, float]]):
    """A model whose layers are worth so much with so many tokens; others in between are worth the next lower."""

    def score(horizons: tuple[int, ...]) -> PieceTable:
        missing = sum(
            max(w.values()) - max(value for tokens, value in w.items() if tokens <= horizon)
            for w, horizon in zip(worth, horizons, strict=True)
        )
        return table(np.full(12, 10 * (5 + missing)), np.full(12, 10.0))

    return score


def test_memory_is_taken_from_where_it_is_missed_least() -> None:
    only_middle = loss([{0: 0.0}, {0: 0.0, 512: 1.0}, {0: 0.0}])
    assert suggest_horizons((512, 512, 512), 512, 64, only_middle).horizons == (0, 512, 0)
    spread = loss([{0: 0, 64: 0.5, 128: 0.8, 256: 0.9, 512: 0.95}, {0: 0, 64: 0.1, 128: 0.2, 256: 0.35, 512: 0.6}])
    found = suggest_horizons((512, 512), 640, 64, spread)
    assert found.horizons == (128, 512)
    best = min((per_piece(spread(pair)), pair) for pair in product(range(0, 513, 64), repeat=2) if sum(pair) == 640)
    assert per_piece(found.predicted) == pytest.approx(best[0])
    assert found.steps[0][0] == (512, 512)
    for budget in (0, 64, 192, 448, 832, 1024):
        assert sum(suggest_horizons((512, 512), budget, 64, spread).horizons) == budget
    for budget in (-64, 100, 1088):
        with pytest.raises(ValueError, match="must be a multiple of 64 from 0 to 1024"):
            suggest_horizons((512, 512), budget, 64, spread)


def test_a_budget_that_is_named_to_begin_with_is_taken() -> None:
    assert half_budget((320, 128), 64) == 192
    for trained in ((64,), (320, 128), (128, 64, 0)):
        check_budget(trained, half_budget(trained, 64), 64)


def test_what_a_layer_is_worth_is_measured_again_once_others_have_lost_theirs() -> None:
    def either(horizons: tuple[int, ...]) -> PieceTable:
        """The first two layers know the same: only without both is it lost."""
        first, second, third = horizons
        missing = (max(first, second) < 512) + 0.01 * (first < 512) + 0.1 * (third < 512)
        return table(np.full(12, 10 * (5 + missing)), np.full(12, 10.0))

    assert suggest_horizons((512, 512, 512), 768, 64, either).horizons == (512, 0, 256)


def per_piece(found: PieceTable) -> float:
    return float(found.nll_P.sum())


def test_the_most_remembered_places_do_not_overlap() -> None:
    onset_N = np.arange(0, 40, 0.5)
    saved_N = np.zeros(80)
    saved_N[20:24], saved_N[22], saved_N[60] = 1.0, 5.0, 2.0
    notes = NoteSavings(np.full(80, 60), onset_N, np.full(80, 0.1), saved_N, saved_N)
    found = remembered_passages(notes)
    assert [(place.start, place.saved, place.num_notes) for place in found] == [(10.0, 8.0, 4), (28.5, 2.0, 4)]
    assert len(remembered_passages(notes, count=1)) == 1


def test_nats_are_given_to_the_note_that_they_announce(midi_folder: Path) -> None:
    tokenizer = build_tokenizer(TokenizerSpec())
    assert isinstance(tokenizer, Performance)
    model = tiny_transformer("1x16+1x4+1x0", vocab_size=len(tokenizer.vocab))
    score, _ = read_midi(next(midi_folder.rglob("*.mid")).read_bytes())
    ids = [int(id_) for id_ in encode(tokenizer, score).ids]
    notes = note_savings(model, tokenizer, ids)
    saved_N = window_nll(model, torch.tensor(ids)) - piece_nll(model, torch.tensor(ids))
    ons = [n for n, id_ in enumerate(ids) if names(tokenizer)[id_].startswith("NoteOn")]
    pitches = [int(names(tokenizer)[ids[n]].split("_")[1]) for n in ons]
    assert notes.pitch_N.tolist() == pitches
    assert notes.saved_N.sum() == pytest.approx(float(saved_N[: ons[-1]].sum()))
    third = slice(ons[1], ons[2])  # targets after the second note-on up to the third
    assert notes.saved_N[2] == pytest.approx(float(saved_N[third].sum()))
    assert notes.saved_pitch_N[2] == pytest.approx(float(saved_N[ons[2] - 1]))
    with pytest.raises(ValueError, match="keeps no memory"):
        note_savings(tiny_transformer("3x0", vocab_size=len(tokenizer.vocab)), tokenizer, ids)


def names(tokenizer: Performance) -> dict[int, str]:
    return {id_: name for name, id_ in tokenizer.vocab.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the smoke config, its cache beside it."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("DSMR_CACHE", str(root / "cache"))
        for name, horizons in (("smoke", "1x320+1x64"), ("none", "2x0")):
            options = ["--model.horizons", horizons, "--trainer.enable_progress_bar", "false"]
            assert main(["fit", "--config", "smoke", "--root", str(root), "--name", name, *options]) == 0
    return root / "smoke"


@pytest.fixture(autouse=True)
def cache(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prepared pieces everywhere."""
    monkeypatch.setenv("DSMR_CACHE", str(run.parent / "cache"))


def dsmr(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def validate(run: Path, output: Path, *options: object, command: str = "validate") -> dict:
    quiet = "--trainer.enable_progress_bar=false"
    assert dsmr(command, "--checkpoint", run, "--output", output, quiet, *options) == 0
    result: dict = json.loads(output.read_text())
    return result


def test_a_run_keeps_the_pieces_of_its_best_weights(run: Path, tmp_path: Path) -> None:
    kept = (run / "pieces.csv").read_bytes()
    found = PieceTable.read(run / "pieces.csv")
    result = validate(run, tmp_path / "v.json")
    assert (run / "pieces.csv").read_bytes() == kept
    metrics = result["metrics"]
    assert np.exp(found.nll_P.sum() / found.tokens_P.sum()) == pytest.approx(metrics["val/perplexity"], rel=1e-6)
    assert found.nll_P.sum() / found.notes_P.sum() == pytest.approx(metrics["val/nats_per_note"], rel=1e-6)
    assert found.seconds_P.sum() == pytest.approx(found.nll_P.sum() / metrics["val/nats_per_second"], rel=1e-5)
    for k, start in enumerate(found.starts):
        perplexity = np.exp(found.nll_PK[:, k].sum() / found.tokens_PK[:, k].sum())
        assert perplexity == pytest.approx(metrics[f"val/position/perplexity_{start}"], rel=1e-5)
        interval = result["intervals"]["position"][str(start)]
        assert interval["value"] == pytest.approx(perplexity)
        assert interval["low"] is interval["high"] is None, "of four pieces"
    assert result["intervals"]["without_interval"] == NO_INTERVAL
    assert set(result["intervals"]["family"]) == {"pitch", "end", "time", "velocity", "other"}
    np.testing.assert_allclose(found.nll_PF.sum(axis=1), found.nll_PK.sum(axis=1))
    model = load_model(run).backbone
    data = MusicData(recall=RecallTask(num_train=16, num_validation=4), segment_length=64, num_lanes=4, transpose=0)
    np.testing.assert_allclose(score_pieces(model, data).nll_P, found.nll_P, rtol=1e-5)


def test_other_weights_and_other_memories_leave_the_pieces_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = (run / "pieces.csv").read_bytes()
    assert validate(run, tmp_path / "a.json", "--model.horizons", "2x64")["by_piece"] is None
    assert "pieces.csv of the run is not changed" in capsys.readouterr().out
    validate(run, tmp_path / "b.json", "--model.horizons", "2x64", "--pieces", tmp_path / "own.csv")
    assert PieceTable.read(tmp_path / "own.csv").names == PieceTable.read(run / "pieces.csv").names
    assert validate(run, tmp_path / "c.json", command="test")["by_piece"] == str(run / "pieces_test.csv")
    assert validate(run / "last.ckpt", tmp_path / "d.json")["by_piece"] == str(run / "pieces_last.csv")
    assert validate(run, tmp_path / "e.json", "--trainer.limit_val_batches", 3)["by_piece"] is None
    assert (run / "pieces.csv").read_bytes() == kept
    assert dsmr("validate", "--checkpoint", run, "--pieces", tmp_path / "no" / "p.csv") == 2
    assert "--pieces" in capsys.readouterr().err


def test_other_evaluations_leave_the_pieces_alone(run: Path, midi_folder: Path, tmp_path: Path) -> None:
    kept = (run / "pieces.csv").read_bytes()
    others = [
        ("--data.validation_stride", 2),
        ("--data.recall.seed", 1),
        ("--data.recall=null", "--data.path", midi_folder),
        ("--trainer.precision", "bf16-mixed"),
    ]
    for number, options in enumerate(others):
        assert validate(run, tmp_path / f"{number}.json", *options)["by_piece"] is None, options
        assert (run / "pieces.csv").read_bytes() == kept, options
    none = run.parent / "none"
    assert validate(none, tmp_path / "w.json", "--data.windows.stride", 32)["by_piece"] is None
    own = tmp_path / "own.csv"
    assert validate(run, tmp_path / "o.json", *others[0], "--pieces", own)["by_piece"] == str(own)
    assert len(PieceTable.read(own).names) == 2
    assert validate(run, tmp_path / "s.json", "--trainer.precision", 32)["by_piece"] == str(run / "pieces.csv")


def test_a_path_is_the_same_however_it_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def settings(path: str | None) -> dict:
        return {"data": {"path": path, "validation_stride": 1}, "trainer": {"precision": None}}

    assert is_as_in_training(settings("midi"), settings(str(tmp_path / "midi")))
    assert not is_as_in_training(settings("midi"), settings("other"))
    assert not is_as_in_training(settings(None), settings("midi"))


def test_an_exported_model_keeps_the_pieces_of_its_own_horizons(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export_model(run, folder)
    assert validate(folder, tmp_path / "a.json", "--model.horizons", "2x64")["by_piece"] is None
    assert not (folder / "pieces.csv").exists()
    assert validate(folder, tmp_path / "b.json")["by_piece"] == str(folder / "pieces.csv")


def test_the_worth_of_each_memory_is_the_difference_of_two_validations(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, command in (("validation", "validate"), ("test", "test")):
        options = ["--split", split, "--folder", tmp_path, "--output", tmp_path / "a.json"]
        capsys.readouterr()
        assert dsmr("analyze", "--checkpoint", run, *options) == 0
        result = json.loads((tmp_path / "a.json").read_text())
        assert set(result["ablated"]) == {"0", "1", "all"}
        lines = capsys.readouterr().out.splitlines()
        layers = [line for line in lines if line.startswith(("  layer", "  all layers"))]
        assert len(layers) == 3
        assert not any("[" in line for line in layers), "no interval of four pieces"
        assert sum(NO_INTERVAL in line for line in lines) == 1
        prefix = "val" if split == "validation" else "test"
        for name, horizons in (("0", "1x0+1x64"), ("1", "1x320+1x0"), ("all", "2x0")):
            with_without = [
                validate(run, tmp_path / "v.json", *options, command=command)["metrics"][f"{prefix}/nats_per_note"]
                for options in ((), ("--model.horizons", horizons))
            ]
            assert result["ablated"][name]["value"] == pytest.approx(with_without[1] - with_without[0], abs=1e-5)
        assert [layer["saved"] for layer in result["layers"]] == [result["ablated"][name] for name in ("0", "1")]
        assert result["all_layers_saved"] == result["ablated"]["all"]
        assert result["nats_per_note"] == pytest.approx(with_without[0], rel=1e-6)


def test_reports_print_and_serialise_from_python(tmp_path: Path) -> None:
    model, data = tiny_transformer("1x16+1x4+1x0", vocab_size=392), recall_data(tmp_path)
    passes: list[int] = []
    report = analyze_memory(model, data, on_pass=lambda: passes.append(1))
    assert len(passes) == 4
    assert [line[:9] for line in report.lines()[1:5]] == ["  layer 2", "  layer 1", "  layer 0", "  all lay"]
    assert json.loads(json.dumps(report.as_dict()))["layers"][2]["saved"] is None
    data.windows = object()
    with pytest.raises(ValueError, match="isolated windows"):
        analyze_memory(model, data)


def test_report_says_who_is_better_in_pairs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dsmr("report", run.parent, "--output", tmp_path, "--against", "none", "--json") == 0
    out = capsys.readouterr().out
    (difference,) = json.loads(out.splitlines()[-1])["paired"]["differences"]
    assert (difference["first"], difference["second"], difference["pieces"]) == ("smoke", "none", 4)
    a, b = (PieceTable.read(run.parent / name / "pieces.csv") for name in ("smoke", "none"))
    assert difference["nats_per_note"] == pytest.approx((a.nll_P - b.nll_P).sum() / a.notes_P.sum())
    assert "## Which is better" in (tmp_path / "README.md").read_text()
    assert dsmr("report", run.parent, "--output", tmp_path, "--against", "gone") == 2
    assert "there are" in capsys.readouterr().err
    shutil.copytree(run.parent, tmp_path / "runs", ignore=shutil.ignore_patterns("pieces*.csv", "*.ckpt"))
    assert dsmr("report", tmp_path / "runs", "--against", "none") == 2
    assert "no such run with pieces.csv; there are none" in capsys.readouterr().err


def test_runs_of_other_pieces_are_named_where_they_cannot_be_compared(run: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        folder = tmp_path / name
        shutil.copytree(run, folder)
        config = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(config.replace("max_steps: 20", f"max_steps: {20 + number}"))
    own = PieceTable.read(tmp_path / "b" / "pieces.csv")
    table(own.nll_P, own.notes_P, ["w", "x", "y", "z"]).write(tmp_path / "b" / "pieces.csv")
    assert dsmr("report", tmp_path) == 0
    assert "scored on different pieces" in (tmp_path / "report" / "README.md").read_text()


def test_analysis_writes_a_suggestion_that_trains(run: Path, tmp_path: Path) -> None:
    options = ["--folder", tmp_path, "--budget", "192", "--plot", "--output", tmp_path / "a.json"]
    assert dsmr("analyze", "--checkpoint", run, *options) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    overlay = Path(result["overlay"])
    spelling = yaml.safe_load(overlay.read_text())["model"]["horizons"]
    assert spelling == result["suggested"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"attention.png", "suggested-192.png"}
    assert [layer["horizon"] for layer in result["layers"]] == [320, 64]
    for layer in result["layers"]:
        assert all(sum(head) == pytest.approx(1) for head in layer["attention_by_distance"])
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.max_steps", "10"]
    assert dsmr("fit", "--config", "smoke", "--config", overlay, "--root", tmp_path, "--name", "own", *quiet) == 0
    again = [*options, "--trained", tmp_path / "own"]
    assert dsmr("analyze", "--checkpoint", run, *again) == 0
    measured = json.loads((tmp_path / "a.json").read_text())["measured"]["value"]
    with (tmp_path / "own" / "metrics.csv").open() as file:
        best = min(float(row["val/nats_per_note"]) for row in csv.DictReader(file) if row["val/nats_per_note"])
    assert measured == pytest.approx(best, rel=1e-5)


def test_a_run_that_is_not_of_the_suggestion_costs_no_result(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--folder", tmp_path, "--budget", "192", "--trained", run, "--output", tmp_path / "a.json"]
    assert dsmr("analyze", "--checkpoint", run, *options) == 0
    out, result = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    assert "smoke was trained with 1x320+1x64, suggested is" in result["not_compared"]
    assert result["not_compared"] in out
    assert "measured" not in result
    for begin in ("  layer 0", "  layer 1", "  all layers", "  predicted"):
        assert "[" not in next(line for line in out.splitlines() if line.startswith(begin)), begin
    assert out.count(NO_INTERVAL) == 1
    assert "chosen on these same pieces" in next(line for line in out.splitlines() if "  predicted" in line)
    assert "chosen on these same pieces" in Path(result["overlay"]).read_text()


def test_a_piece_is_heard_note_by_note(run: Path, tmp_path: Path) -> None:
    piece = write_midi(tmp_path / "long.mid", seed=3, num_notes=90)
    options = ["--folder", tmp_path, "--picture", "--output", tmp_path / "a.json"]
    assert dsmr("analyze", "--checkpoint", run, "--piece", piece, *options) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["notes"] == 90 == len(result["by_note"]["saved_N"])
    assert 1 <= len(result["places"]) <= 10
    assert (tmp_path / "long.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint", "{root}/none"], "keeps no memory by layer"),
        ([], "needs a trained model"),
        (["--checkpoint", "{root}/smoke", "--budget", "100"], "--budget 100 must be a multiple of 64"),
        (["--checkpoint", "{root}/smoke", "--piece", "gone.mid"], "--piece gone.mid cannot be read"),
        (["--checkpoint", "{root}/smoke", "--piece", "{root}/smoke/config.yaml"], "cannot be used"),
        (["--checkpoint", "{root}/smoke", "--piece", "{root}/short.mid"], "fit into one segment"),
        (["--checkpoint", "{root}/smoke", "--piece", "x.mid", "--budget", "64"], "in a call of its own"),
        (["--checkpoint", "{root}/smoke", "--trained", "x"], "give the --budget"),
        (["--checkpoint", "{root}/smoke", "--budget", "192", "--trained", "gone"], "gone: no such run"),
        (["--checkpoint", "{root}/smoke", "--budget", "192", "--trained", "{root}/bare"], "has no pieces.csv"),
        (["--checkpoint", "{root}/smoke", "--device", "foo"], "--device foo"),
        (["--checkpoint", "{root}/smoke", "--split", "train"], "--split train is not one of"),
        (["--checkpoint", "{root}/smoke", "--split", "test", "--budget", "192"], "leave out --split test"),
        (["--checkpoint", "{root}/smoke", "--model.horizons", "2x64"], "trained with horizons = 1x320+1x64"),
        (["--checkpoint", "{root}/smoke", "--folder", "{root}/smoke/config.yaml"], "config.yaml cannot be made"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(
    run: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_midi(run.parent / "short.mid", seed=0, num_notes=5)
    (run.parent / "bare").mkdir(exist_ok=True)
    shutil.copy(run / "best.ckpt", run.parent / "bare")

    def measure(*_: object) -> None:
        raise AssertionError("measured before the mistake was found")

    monkeypatch.setattr("dsmr.analyze.layers.score_pieces", measure)
    given = [argument.format(root=run.parent) for argument in arguments]
    assert dsmr("analyze", "--folder", tmp_path, *given) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dsmr: error: ")
    assert said in line
