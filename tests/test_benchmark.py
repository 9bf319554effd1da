"""The benchmark: what its rows count, and that it notices a backend that computes something else."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsmr.benchmark import training_speed as training
from dsmr.benchmark.runner import run_benchmark
from dsmr.benchmark.settings import BenchmarkSettings, Workload
from dsmr.benchmark.training_speed import TrainingStep
from dsmr.benchmark.variants import Row
from dsmr.cli import main
from dsmr.cli.benchmark_command import BenchmarkCLI
from dsmr.model import RecurrentTransformer

SMALL = BenchmarkSettings(
    horizons={"full": "2x256", "short": "2x128"},
    materialised=["full"],
    peers=False,
    prefix_length=256,
    repeats=2,
    warmup=0,
    steps=1,
    decode_tokens=2,
    decode_lanes=[1, 2],
    piece_lengths=[],
)
OURS = ["full", "short", "perceiver_ar", "materialised_full"]


def workload(d_model: int = 16, **changes: Any) -> Workload:
    like = RecurrentTransformer(32, "2x128", 128, d_model=d_model, num_layers=2, num_heads=2)
    return Workload(replace(SMALL, **changes), like, 2, torch.device("cpu"))


@pytest.fixture(scope="module")
def result() -> dict:
    return run_benchmark(workload())


def rows(result: dict) -> dict[str, dict]:
    return {row["name"]: row for row in result["rows"]}


def test_every_row_is_measured_and_compared_with_full(result: dict) -> None:
    found = rows(result)
    names = [*OURS, *(f"{name}_decode{lanes}" for lanes in ("", "_2") for name in ("full", "short", "perceiver_ar"))]
    assert list(found) == names
    assert all(row["tokens_per_second"] > 0 and row["relative_to_full"] > 0 for row in found.values())
    assert found["full"]["relative_to_full"] == found["full_decode"]["relative_to_full"] == 1
    assert {"commit", "hardware", "config", "versions", "absent"} <= result.keys()
    json.dumps(result)


def test_bytes_are_those_of_the_formula(result: dict) -> None:
    found = rows(result)
    ring = 2 * 4 * 2 * 16 * 2  # keys and values, float32, lanes, width, layers
    counters = 2 * 8
    assert found["full"]["state_mib"] * 2**20 == ring * 256 + counters
    assert found["short"]["state_mib"] * 2**20 == ring * 128 + counters
    assert found["full"]["saved_mib"] == found["short"]["saved_mib"]
    scores = 2 * 2 * 128 * (256 + 128) * 4 * 2  # lanes, heads, queries, keys, float32, layers
    assert (found["materialised_full"]["saved_mib"] - found["full"]["saved_mib"]) * 2**20 > scores
    assert found["full"]["parameters"] == found["short"]["parameters"] == found["perceiver_ar"]["parameters"]


def test_a_backend_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsmr.attention.backends import IMPLEMENTATIONS, Implementation

    plain = IMPLEMENTATIONS["materialised"].function
    monkeypatch.setitem(IMPLEMENTATIONS, "materialised", Implementation(lambda *given: plain(*given) * 1.01))
    found = run_benchmark(workload(repeats=1, rows=["full", "materialised_full"]))
    assert found["wrong"] == ["materialised_full"]
    assert "differs from the reference backend" in found["absent"]["materialised_full"]
    assert [row["name"] for row in found["rows"]] == ["full"]


def test_peers_read_the_same_tokens_and_sizes() -> None:
    pytest.importorskip("x_transformers")
    pytest.importorskip("perceiver_ar_pytorch")
    names = ["full", "x_transformers_xl", "perceiver_ar_pytorch", "x_transformers_decode"]
    found = rows(run_benchmark(workload(64, peers=True, repeats=1, rows=names)))
    assert list(found) == names
    assert found["x_transformers_xl"]["parameters"] == pytest.approx(found["full"]["parameters"], rel=0.02)
    assert found["x_transformers_xl"]["state_mib"] * 2**20 == 2 * 2 * 256 * 64 * 4  # layers, lanes, slots, width


def test_an_absent_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(work: Workload) -> TrainingStep:
        raise ImportError("No module named 'x_transformers'")

    monkeypatch.setitem(training.PEERS, "x_transformers_xl", absent)
    result = run_benchmark(workload(peers=True, repeats=1, rows=["full", "x_transformers_xl"]))
    assert list(rows(result)) == ["full"]
    assert "dsmr[bench]" in result["absent"]["x_transformers_xl"]


def test_a_peer_that_cannot_have_these_sizes_is_named() -> None:
    pytest.importorskip("perceiver_ar_pytorch")
    result = run_benchmark(workload(peers=True, repeats=1, rows=["full", "perceiver_ar_pytorch"]))
    assert "heads of width 32" in result["absent"]["perceiver_ar_pytorch"]


def test_running_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = training.network_step

    def full(work: Workload, row: Row, backend: Any) -> TrainingStep:
        if row.horizons == (128, 128):
            raise torch.OutOfMemoryError
        return plain(work, row, backend)

    monkeypatch.setattr(training, "network_step", full)
    found = rows(run_benchmark(workload(repeats=1, rows=["full", "short"])))
    assert found["short"]["out_of_memory"] is True
    assert found["full"]["tokens_per_second"] > 0


def test_a_piece_takes_time_in_proportion_and_no_more_memory() -> None:
    result = run_benchmark(workload(piece_lengths=[256, 1024], repeats=1, rows=["full"], decode_tokens=0))
    (curve,) = result["pieces"]
    assert [point["tokens"] for point in curve["points"]] == [256, 1024]
    assert curve["points"][0]["state_mib"] == curve["points"][1]["state_mib"] == 2 * 4 * 16 * 512 / 2**20
    assert curve["points"][0]["seconds"] < curve["points"][1]["seconds"]


def test_precisions_are_rows_of_their_own_with_their_own_full() -> None:
    judged = []

    def judge(work: Workload, row: Row) -> dict:
        judged.append((work.precision, row.horizons))
        return {"perplexity": float(len(judged))}

    given = {"precisions": ["32-true", "bf16-mixed"], "repeats": 1, "decode_tokens": 0, "materialised": []}
    result = run_benchmark(workload(**given, train_tokens=1), train=judge)
    assert judged == [(p, h) for p in ("32-true", "bf16-mixed") for h in ((256, 256), (128, 128), None)]
    found = rows(result)
    assert {"full@32-true", "short@32-true", "full@bf16-mixed", "short@bf16-mixed"} <= set(found)
    assert found["full@bf16-mixed"]["relative_to_full"] == 1
    assert found["full@bf16-mixed"]["perplexity"] == 4
    assert found["full@bf16-mixed"]["state_mib"] < found["full@32-true"]["state_mib"]


@pytest.fixture(scope="module")
def smoke() -> dict:
    small = {
        "repeats": 1,
        "warmup": 0,
        "steps": 1,
        "decode_tokens": 1,
        "piece_lengths": [64, 256],
        "train_tokens": 512,
    }
    given = [f"--benchmark.{key}={json.dumps(value)}" for key, value in small.items()]
    cli = BenchmarkCLI("benchmark", ["--config", "base", "--config", "smoke", *given, "--trainer.limit_val_batches=1"])
    assert cli.config_init.benchmark == BenchmarkSettings(**small)  # type: ignore[arg-type]
    return {"given": given}


def test_the_command_measures_every_row_of_the_table(smoke: dict, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "base", "--config", "smoke", "--trainer.limit_val_batches=1"]
    assert main(["benchmark", *arguments, *smoke["given"], "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| `full` |") for line in lines)
    result = json.loads(lines[-1])
    found = rows(result)
    table = ["full", "perceiver_ar", "two_scale", "binary_sliding", "ascending", "binary", "descending", "uniform"]
    table += ["two_scale_upper", "two_scale_interleaved", "two_scale_whole", "memoryless", "windowed"]
    peers = ["x_transformers_xl", "perceiver_ar_pytorch"]
    assert {*table, "materialised_full", *peers} - set(result["absent"]) <= set(found)
    assert set(result["absent"]) <= {*peers, "x_transformers_decode"}
    equal = [found[name] for name in table if name != "windowed"]
    assert {(row["parameters"], row["lanes"], row["segment_length"]) for row in equal} == {(131_904, 4, 64)}
    windowed = found["windowed"]
    assert (windowed["lanes"], windowed["segment_length"], windowed["parameters"]) == (1, 256, 131_904)
    budgets = {found[name]["budget"] for name in ("two_scale", "binary", "ascending", "uniform", "descending")}
    assert budgets == {384}
    assert found["full"]["perplexity"] > 1
    assert found["full"]["trained_tokens"] == 512
    assert result["config"]["seed"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--benchmark.rows=[fulll]"], "fulll is unknown; known: full"),
        (["--benchmark.repeats=0"], "repeats is 0"),
        (['--benchmark.horizons={"short": "2x64"}'], "must have the row `full`"),
        (['--benchmark.horizons={"full": "3x64"}'], "have 3 layers, but num_layers is 2"),
        (['--benchmark.horizons={"full": "2x64"}', "--benchmark.materialised=[odd]"], "odd is not in horizons"),
        (["--benchmark.decode_lanes=[0]"], "must all be at least 1"),
        (["--benchmark.repeat=3"], "unknown key benchmark.repeat"),
        (["--trainer.precision=16-mixed"], "needs a CUDA device"),
        (["--trainer.precision=64-true"], "is not one of"),
        (["--trainer.accelerator=tpu"], "is not supported; choose from auto, cpu"),
        (["--config", "memoryless", "--model.horizons=2x0"], "the rows need a budget"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "--config", "smoke", *arguments]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_the_shipped_config_is_what_the_targets_are_about() -> None:
    cli = BenchmarkCLI("benchmark", ["--config", "benchmark_cpu"])
    network, settings = cli.model.backbone, cli.config_init.benchmark
    sizes = [network.embedding.embedding_dim, len(network.blocks), network.segment_length, cli.datamodule.num_lanes]
    assert sizes == [256, 8, 512, 2]
    assert cli.config.trainer.precision == "32-true"
    assert settings.horizons["full"] == "8x4096"
    assert settings.horizons["two_scale"] == "2x4096+6x512"


def test_layers_are_compiled_as_configured_except_by_plain_backends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
    work = workload()
    row = work.known_rows()[0]["full"]
    for way in (False, True, "together"):
        work.like.settings = replace(work.like.settings, compile_blocks=way)
        assert work.network(row, "auto").settings.compile_blocks is way
        assert work.network(row, "auto", is_compiled=False).settings.compile_blocks is False
        assert work.network(row, "reference").settings.compile_blocks is False
        assert work.network(row, "materialised").settings.compile_blocks is False
