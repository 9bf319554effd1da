"""`dsmr report` and the callbacks that it reads from."""

import csv
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from symusic import Score

from conftest import tiny_transformer
from dsmr.cli import main
from dsmr.cli.lightning_cli import QUIET
from dsmr.model.backbone import evaluation_copy
from dsmr.results.runs import collect_results, read_run
from dsmr.results.tables import BENCHMARK_COLUMNS, markdown_table
from dsmr.training.metrics import PositionPerplexity


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, with samples, and a benchmark file."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("DSMR_CACHE", str(root / "cache"))
        make(root)
    return root


def make(root: Path) -> None:
    smoke = ["fit", "--config", "smoke", "--root", str(root), "--trainer.enable_progress_bar", "false"]
    assert main([*smoke, "--name", "two", "--sample_every_n_steps", "10"]) == 0
    assert main([*smoke, "--name", "none", "--model.horizons", "2x0", "--sample_every_n_steps", "0"]) == 0
    benchmark = ["benchmark", "--config", "smoke", "--benchmark.rows", "[full,two_scale]", "--benchmark.repeats", "1"]
    piece = ["--benchmark.piece_lengths", "[64,128]", "--benchmark.warmup", "0"]
    assert main([*benchmark, *piece, "--output", str(root / "speed.json")]) == 0


@pytest.fixture(autouse=True)
def lightnings_own_warnings() -> None:
    """Keep the program's own filters inside a test."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)


def logged(run: Path, column: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


def test_performance_is_logged_and_named_for_what_it_is(runs: Path) -> None:
    two = runs / "two"
    assert all(value > 0 for value in logged(two, "perf/tokens_per_second"))
    assert set(logged(two, "perf/state_mib")) == {2 * 4 * 4 * 64 * (320 + 64) / 2**20}
    assert set(logged(runs / "none", "perf/state_mib")) == {0.0}
    assert logged(two, "perf/peak_rss_gib")[-1] > 0.05
    with (two / "metrics.csv").open() as file:
        assert "perf/peak_memory_gib" not in next(csv.reader(file))


def test_what_is_logged_as_kept_is_what_is_predicted(runs: Path) -> None:
    from dsmr.cli.benchmark_command import BenchmarkCLI
    from dsmr.cost.operations import saved_bytes as predicted

    (counted,) = set(logged(runs / "two", "perf/saved_mib"))
    network = BenchmarkCLI("benchmark", ["--config", "smoke"]).model.backbone
    assert predicted(network, 4, "merged", 4, on_cpu=True) / 2**20 == pytest.approx(counted, rel=0.10)


def test_samples_are_music_and_its_piano_roll(runs: Path) -> None:
    names = sorted(path.name for path in (runs / "two" / "samples").iterdir())
    assert names == ["step-0000010.mid", "step-0000010.png", "step-0000020.mid", "step-0000020.png"]
    assert Score(runs / "two" / "samples" / "step-0000010.mid").note_num() > 10
    assert not (runs / "none" / "samples").exists()


def test_samples_change_nothing_in_training(runs: Path, tmp_path: Path) -> None:
    smoke = ["fit", "--config", "smoke", "--root", str(tmp_path), "--trainer.enable_progress_bar", "false"]
    assert main([*smoke, "--name", "plain", "--sample_every_n_steps", "0"]) == 0
    assert logged(tmp_path / "plain", "train/nll") == logged(runs / "two", "train/nll")
    weights = [
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (tmp_path / "plain", runs / "two")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_evaluation_copy_shares_the_weights_and_draws_nothing() -> None:
    network = tiny_transformer().float()
    before = torch.get_rng_state()
    made = evaluation_copy(network)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(network.parameters(), made.parameters(), strict=True)
    assert all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in pairs)
    assert not made.training


def test_positions_partition_all_tokens() -> None:
    metric = PositionPerplexity()
    generator = torch.Generator().manual_seed(0)
    total, tokens = 0.0, 0
    by_hand: dict[int, list[float]] = {}
    for _ in range(5):
        nll_BT = torch.rand(3, 100, generator=generator)
        start_B, skipped = torch.randint(1, 3000, (3,), generator=generator), 20
        is_real_BT = torch.ones(3, 100, dtype=torch.bool)
        is_real_BT[0, :skipped] = False  # a window's context, before what is scored
        is_real_BT[1, 70:] = False  # a piece's end
        metric.update(nll_BT, is_real_BT, start_B)
        total, tokens = total + float(nll_BT[is_real_BT].sum()), tokens + int(is_real_BT.sum())
        for lane in range(3):
            for place in range(100):
                if is_real_BT[lane, place]:
                    position = int(start_B[lane]) + place - (skipped if lane == 0 else 0)
                    stretch = max(first for first in metric.STARTS if first <= position)
                    by_hand.setdefault(stretch, []).append(float(nll_BT[lane, place]))
    assert float(metric.nll_K.sum()) == pytest.approx(total, rel=1e-6)
    assert int(metric.tokens_K.sum()) == tokens
    for name, value in metric.compute().items():
        values = by_hand.get(int(name.rpartition("_")[2]))
        if values is None:
            assert value.isnan()
        else:
            assert float(value.log()) == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_a_report_has_tables_and_plots(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs), "--output", str(tmp_path / "report"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {run["name"] for run in result["runs"]} == {"two", "none"}
    assert result["benchmarks"] == ["speed"]
    assert not result["unread"]
    plots = ["learning.png", "positions.png", "schedules.png", "tradeoff.png"]
    plots += ["speed-pieces.png", "speed-speed.png"]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(["README.md", *plots])
    text = (tmp_path / "report" / "README.md").read_text()
    assert "| `two` | 1x320+1x64 | 20 |" in text
    assert all(f"({plot})" in text for plot in plots)
    best = min(logged(runs / "two", "val/perplexity"))
    perplexities = [run["val/perplexity"] for run in result["runs"]]
    assert perplexities == sorted(perplexities)
    assert f"| {best:.3f} |" in text


def test_a_run_without_a_validation_comes_last_and_a_curve_counts_all_tokens(runs: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        broken_copy(runs, tmp_path / name, nan_from=99)
    config = tmp_path / "b" / "config.yaml"
    config.write_text(config.read_text().replace("accumulate_grad_batches: 1", "accumulate_grad_batches: 3"))
    with (tmp_path / "a" / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("val/")} for row in csv.DictReader(file)]
    with (tmp_path / "a" / "metrics.csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    second, first = collect_results(tmp_path).runs[::-1]
    assert (first.name, second.name) == ("b", "a")
    assert second.metrics["note"] == "never validated"
    assert second.curve("train/nll")[0][0] == 5 * 4 * 64
    assert first.curve("train/nll")[0][0] == 5 * 4 * 64 * 3


def test_a_benchmark_of_decoding_alone_has_no_plot_of_training(runs: Path, tmp_path: Path) -> None:
    result = json.loads((runs / "speed.json").read_text())
    result["rows"] = [{**row, "kind": "decoding"} for row in result["rows"]]
    (tmp_path / "decode.json").write_text(json.dumps(result | {"pieces": []}))
    assert main(["report", str(tmp_path)]) == 0
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["README.md"]


def test_a_row_that_found_no_memory_says_so() -> None:
    rows = [{"name": "full", "out_of_memory": True}, {"name": "short", "tokens_per_second": 12.3}]
    assert markdown_table(rows, BENCHMARK_COLUMNS)[2:] == ["| `full` | out of memory |", "| `short` | 12 |"]


def test_vector_plots_on_demand(runs: Path, tmp_path: Path) -> None:
    assert main(["report", str(runs), "--output", str(tmp_path), "--format", "svg"]) == 0
    assert (tmp_path / "learning.svg").read_text().lstrip().startswith("<?xml")


def broken_copy(runs: Path, target: Path, *, nan_from: int) -> Path:
    target.mkdir(parents=True)
    (target / "config.yaml").write_text((runs / "two" / "config.yaml").read_text())
    rows = (runs / "two" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/nll")
    for number in range(nan_from, len(rows)):
        cells = rows[number].split(",")
        cells[column] = cells[column] and "nan"
        rows[number] = ",".join(cells)
    (target / "metrics.csv").write_text("\n".join(rows) + "\n")
    return target


def test_a_run_that_is_no_number_says_from_where_on(runs: Path, tmp_path: Path) -> None:
    broken = broken_copy(runs, tmp_path / "nan", nan_from=2)
    assert read_run(broken).metrics["note"] == "not finite from step 9 on"
    assert main(["report", str(tmp_path)]) == 0
    assert "not finite from step 9 on" in (tmp_path / "report" / "README.md").read_text()


def test_runs_whose_folders_are_share_a_name_have_different_names(runs: Path, tmp_path: Path) -> None:
    for folder in ("a/seed=0", "b/seed=0", "b/seed=1"):
        broken_copy(runs, tmp_path / folder, nan_from=99)
    assert {run.name for run in collect_results(tmp_path).runs} == {"a/seed=0", "b/seed=0", "seed=1"}
    assert main(["report", str(tmp_path), "--format", "svg"]) == 0
    plots = {name: (tmp_path / "report" / f"{name}.svg").read_text() for name in ("learning", "schedules")}
    shown = {
        name: [f"<!-- {run} -->" in text for run in ("a/seed=0", "b/seed=0", "seed=1")] for name, text in plots.items()
    }
    assert all(shown["learning"])
    assert sum(shown["schedules"]) == 1  # they are of one schedule


@pytest.mark.parametrize("is_there", [False, True])
def test_a_table_is_there_whatever_becomes_of_its_plots(
    is_there: bool, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_there:  # but cannot draw
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    else:
        monkeypatch.setattr("dsmr.results.plotting.find_spec", lambda _: None)
    assert main(["report", str(runs), "--output", str(tmp_path)]) == (2 if is_there else 0)
    text = (tmp_path / "README.md").read_text()
    assert "| `two` | 1x320+1x64 | 20 |" in text
    assert "## Benchmark speed" in text
    assert "](learning" not in text
    assert ("No plots: plots need matplotlib" in text) != is_there


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text((runs / "two" / "config.yaml").read_text())
    (tmp_path / "empty" / "metrics.csv").write_text("")
    broken_copy(runs, tmp_path / "good", nan_from=99)
    found = collect_results(tmp_path)
    assert [run.name for run in found.runs] == ["good"]
    assert set(found.unread) == {"odd.json", "empty"}
    assert "logged nothing" in found.unread["empty"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{here}/absent"], "is not a folder"),
        (["{here}"], "holds no run (config.yaml and metrics.csv) and no benchmark file"),
        (["{runs}", "--format", "gif"], "is not one of png, svg"),
        (["{runs}", "--output", "{runs}/speed.json"], "is a file; name a folder"),
        ([], "folder"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], said: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *(argument.format(here=tmp_path, runs=runs) for argument in arguments)]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
