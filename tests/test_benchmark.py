"""The benchmark: what its rows count, and that it notices a form that computes something else."""

import json

import pytest
import torch

from dsmr import benchmark
from dsmr.benchmark import Settings
from dsmr.cli import main
from dsmr.cli.benchmark import parser
from dsmr.cli.configs import find_config

SMALL = {
    "horizons": {"full": "2x256", "short": "2x128"},
    "materialised": ["full"],
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "segment_length": 128,
    "num_lanes": 2,
    "prefix_length": 256,
    "vocab_size": 32,
    "repeats": 2,
    "warmup": 0,
    "steps": 1,
    "decode_tokens": 2,
    "decode_lanes": [1, 2],
    "device": "cpu",
}
OURS = ["full", "short", "perceiver_ar", "materialised_full"]


@pytest.fixture(scope="module")
def result() -> dict:
    return benchmark.run(Settings(**SMALL, peers=False))


def rows(result: dict) -> dict[str, dict]:
    return {row["name"]: row for row in result["rows"]}


def test_every_row_is_measured_and_told_against_full(result: dict) -> None:
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


def test_a_form_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsmr.model import attention

    plain = attention.materialised
    monkeypatch.setattr(attention, "materialised", lambda *given: plain(*given) * 1.01)
    monkeypatch.setattr(attention, "_chosen", {})
    with pytest.raises(ArithmeticError, match="differs from the reference form"):
        benchmark.run(Settings(**SMALL, peers=False, rows=["materialised_full"]))


def test_peers_read_the_same_tokens_and_sizes() -> None:
    pytest.importorskip("x_transformers")
    pytest.importorskip("perceiver_ar_pytorch")
    names = ["full", "x_transformers_xl", "perceiver_ar_pytorch", "x_transformers_decode"]
    found = rows(benchmark.run(Settings(**{**SMALL, "d_model": 64, "repeats": 1}, rows=names)))
    assert list(found) == names
    assert found["x_transformers_xl"]["parameters"] == pytest.approx(found["full"]["parameters"], rel=0.02)
    assert found["x_transformers_xl"]["state_mib"] * 2**20 == 2 * 2 * 256 * 64 * 4  # layers, lanes, slots, width


def test_an_absent_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(settings: Settings) -> None:
        raise ImportError("No module named 'x_transformers'")

    monkeypatch.setattr(benchmark, "x_transformers_step", absent)
    result = benchmark.run(Settings(**{**SMALL, "repeats": 1}, rows=["full", "x_transformers_xl"]))
    assert list(rows(result)) == ["full"]
    assert "dsmr[bench]" in result["absent"]["x_transformers_xl"]


def test_running_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = benchmark.our_step

    def full(settings: Settings, horizons: str, form: str) -> benchmark.Step:
        if horizons == "2x128":
            raise torch.OutOfMemoryError
        return plain(settings, horizons, form)  # type: ignore[arg-type]

    monkeypatch.setattr(benchmark, "our_step", full)
    found = rows(benchmark.run(Settings(**{**SMALL, "repeats": 1}, rows=["full", "short"])))
    assert found["short"]["out_of_memory"] is True
    assert found["full"]["tokens_per_second"] > 0


def test_the_command_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"--{key}={json.dumps(value)}" for key, value in SMALL.items() if key != "device"]
    assert main(["benchmark", *given, "--device=cpu", "--rows=[full,short_decode]", "--repeats=1", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| `full` |") for line in lines)
    assert [row["name"] for row in json.loads(lines[-1])["rows"]] == ["full", "short_decode"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows=[fulll]"], "fulll is unknown; known: full"),
        (["--repeats=0"], "repeats is 0"),
        (['--horizons={"short": "12x128"}'], "must have the row `full`"),
        (["--materialised=[odd]"], "odd is not in horizons"),
        (["--d_modell=3"], "unknown key d_modell"),
        (["--precision=fp16-mixed", "--device=cpu"], "needs a CUDA device"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *arguments]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_the_shipped_config_is_what_the_targets_are_about() -> None:
    options = parser().parse_args(["--config", str(find_config("benchmark_cpu"))])
    sizes = [options.d_model, options.num_layers, options.segment_length, options.num_lanes, options.precision]
    assert sizes == [256, 8, 512, 2, "32-true"]
    assert options.horizons["full"] == "8x4096"
    assert options.horizons["two_scale"] == "2x4096+6x512"
