"""The cost model: what it says equals what is allocated, kept and multiplied."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsmr.attention.backends import Backend
from dsmr.benchmark.settings import BenchmarkSettings, Workload
from dsmr.benchmark.training_speed import measure_saved_bytes, network_step
from dsmr.benchmark.variants import Row, VariantSizes, build_network, variant_rows
from dsmr.cli import main
from dsmr.cli.lightning_cli import SizesCLI
from dsmr.cost.devices import DEVICES, find_device, match_device
from dsmr.cost.estimate import (
    TrainingPlan,
    estimate_training,
    largest_horizons,
    largest_lanes,
    peak_parts,
    usable_bytes,
)
from dsmr.cost.operations import count_flops
from dsmr.cost.operations import saved_bytes as predicted
from dsmr.model import RecurrentTransformer
from dsmr.model.horizons import format_horizons

LANES, LENGTH = 2, 128
CPU = torch.device("cpu")


def workload(**sizes: Any) -> Workload:
    given: dict[str, Any] = {"d_model": 64, "num_layers": 3, "num_heads": 4, "dropout": 0.0} | sizes
    like = RecurrentTransformer(392, "1x512+2x128", LENGTH, **given)
    return Workload(BenchmarkSettings(prefix_length=512), like, LANES, CPU)


ROWS = {"long": Row((512, 512, 512)), "mixed": Row((512, 128, 0)), "perceiver": Row(None)}


KEPT: list[tuple[str, Backend, str]] = [
    *((row, "merged", precision) for row in ROWS for precision in ("32-true", "bf16-mixed")),
    ("mixed", "reference", "32-true"),
    ("long", "materialised", "32-true"),
]


@pytest.mark.parametrize(("row", "backend", "precision"), KEPT)
def test_kept_bytes_are_predicted_within_ten_per_cent(row: str, backend: Backend, precision: str) -> None:
    work = replace(workload(), precision=precision)
    network = work.network(ROWS[row], backend)
    measured = measure_saved_bytes(network_step(work, ROWS[row], backend))
    assert predicted(network, LANES, backend, work.dtype.itemsize, on_cpu=True) == pytest.approx(measured, rel=0.10)


def test_grouped_queries_and_checkpointing_are_predicted_too() -> None:
    for sizes in ({"num_kv_heads": 1}, {"activation_checkpointing": True}, {"dropout": 0.1}):
        work = workload(**sizes)
        measured = measure_saved_bytes(network_step(work, ROWS["mixed"], "merged"))
        network = work.network(ROWS["mixed"], "merged")
        assert predicted(network, LANES, "merged", 4, on_cpu=True) == pytest.approx(measured, rel=0.10)


def test_operations_are_those_that_torch_counts() -> None:
    work = workload()
    for name in ("long", "mixed"):
        step = network_step(work, ROWS[name], "materialised")
        with FlopCounterMode(display=False) as counter:
            step.loss().backward()
        network = work.network(ROWS[name], "materialised")
        counted = counter.get_total_flops() / (LANES * LENGTH)
        assert count_flops(network, "materialised").executed == pytest.approx(counted, rel=1e-6)


def test_model_operations_do_not_depend_on_the_backend_and_equal_budgets_cost_the_same() -> None:
    work = workload()
    two, even = (work.network(Row(h), "merged") for h in ((512, 128, 128), (256, 256, 256)))
    assert len({count_flops(two, backend).model for backend in ("merged", "flex", "reference", "materialised")}) == 1
    assert count_flops(two, "merged") == count_flops(even, "merged")
    assert (
        count_flops(two, "merged").executed
        < count_flops(two, "flex").executed
        < count_flops(two, "reference").executed
    )


def plan(device: str, lanes: int = 8, horizons: str = "2x3584+10x512") -> TrainingPlan:
    with torch.device("meta"):
        network = RecurrentTransformer(392, horizons, 512)
    return TrainingPlan(network, lanes, "bf16-mixed", find_device(device))


@pytest.mark.parametrize("device", ["rtx-3060-12gb", "rtx-3080-10gb", "rtx-4090-24gb"])
def test_the_largest_budget_fits_and_a_larger_one_does_not(device: str) -> None:
    given = plan(device, lanes=16, horizons="12x1024")
    horizons = largest_horizons(given, block=128)
    limit = usable_bytes(find_device(device))

    def peak(tokens: tuple[int, ...]) -> int:
        return sum(peak_parts(plan(device, lanes=16, horizons=format_horizons(tokens))).values())

    assert sum(horizons) > 12 * 1024
    assert peak(horizons) <= limit
    assert peak((*horizons[:-1], horizons[-1] + 128)) > limit


def test_horizons_stop_at_the_longest_piece() -> None:
    assert max(largest_horizons(plan("h200-141gb"), block=128)) == 131_072


def test_the_most_lanes_fit_and_one_more_does_not() -> None:
    most = largest_lanes(plan("rtx-3060-12gb"))
    limit = usable_bytes(find_device("rtx-3060-12gb"))
    assert sum(peak_parts(plan("rtx-3060-12gb", lanes=most)).values()) <= limit
    assert sum(peak_parts(plan("rtx-3060-12gb", lanes=most + 1)).values()) > limit


def test_weights_gradients_moments_and_time_are_plain_arithmetic() -> None:
    kept = {}
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        made = plan("rtx-3090-24gb")
        parts = peak_parts(TrainingPlan(made.network, 8, precision, made.device))
        kept[precision] = [parts[name] for name in ("weights", "gradients", "optimizer")]
    parameters = sum(p.numel() for p in made.network.parameters())
    assert kept["32-true"] == kept["bf16-mixed"] == [4 * parameters, 4 * parameters, 8 * parameters]
    assert kept["bf16-true"] == [2 * parameters, 2 * parameters, 4 * parameters]
    found = estimate_training(made, 3_600_000, price_per_hour=2.0)
    slow, fast = found["tokens_per_second"]
    assert found["epoch_hours"] == pytest.approx([1000 / fast, 1000 / slow])
    assert found["epoch_cost"] == pytest.approx([2000 / fast, 2000 / slow])
    assert usable_bytes(made.device) == int(24 * 2**30 * 0.9)


def test_without_a_device_there_is_no_word_on_its_speed() -> None:
    figures = estimate_training(TrainingPlan(plan("h200-141gb").network, 8, "32-true"), 1000)
    assert not {"tokens_per_second", "peak_bytes", "epoch_hours", "device"} & figures.keys()


def test_rows_at_base_size_are_the_shipped_overlays() -> None:
    rows, absent = variant_rows(VariantSizes(12, 512, 12_288, 128))
    assert not absent
    for name in rows:
        network = SizesCLI("estimate", ["--config", name]).model.backbone
        assert network.horizons == (rows[name].horizons or ())
        assert network.rule == rows[name].rule
    network = SizesCLI("estimate", ["--config", "base"]).model.backbone
    made = build_network(rows["perceiver_ar"], network, prefix_length=4096)
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in network.parameters())


def test_what_cannot_be_expressed_is_left_out_with_the_reason() -> None:
    rows, absent = variant_rows(VariantSizes(5, 128, 1152, 128))
    assert "uniform" not in rows
    assert "cannot spend a budget of 1152" in absent["uniform"]
    assert all(sum(row.horizons) == 1152 for name, row in rows.items() if name.startswith(("binary", "asc", "desc")))


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA GeForce RTX 3060", "rtx-3060-12gb"),
        ("NVIDIA GeForce RTX 3060 Ti", None),
        ("NVIDIA GeForce RTX 4060 Ti", "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 4060", "rtx-4060-8gb"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", None),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("NVIDIA L4", "l4-24gb"),
        ("Tesla T4", "t4-16gb"),
    ],
)
def test_gpus_are_known_by_what_torch_calls_them(gpu: str, name: str | None) -> None:
    found = match_device(gpu)
    assert (found.name if found else None) == name


def test_a_beginning_that_fits_several_devices_is_asked_back() -> None:
    assert find_device("rtx 3090").name == "rtx-3090-24gb"
    with pytest.raises(ValueError, match="did you mean a100-40gb or a100-80gb"):
        find_device("A100")


def test_every_device_has_a_source_and_plausible_numbers() -> None:
    for name, device in DEVICES.items():
        assert device.name == name
        assert device.source
        assert device.float32 < device.float16
        assert 4 < device.memory_gib < 200


def test_the_command_answers_with_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config", "base", "--device", "rtx-3060-12gb", "--fit-memory", "--trainer.precision", "bf16-mixed"]
    assert main(["estimate", *given, "--price-per-hour", "0.5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    fit = result["fit_memory"]
    assert fit["fits"] is True
    assert fit["budget"] == sum(fit["horizons"]) > 12_288
    assert fit["peak_bytes"] <= fit["usable_bytes"]
    assert [row["name"] for row in result["rows"]][:3] == ["full", "perceiver_ar", "two_scale"]
    assert result["epoch_cost"][0] == pytest.approx(0.5 * result["epoch_hours"][0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "rtx-3061"], "did you mean rtx-3060-12gb"),
        (["--fit-memory"], "need a --device"),
        (["--device", "t4", "--trainer.precision", "bf16-mixed"], "use 16-mixed or 32-true"),
        (["--device", "4090", "--trainer.precision", "64-true"], "is not one of 32-true"),
        (["--device", "4090", "--price-per-hour", "-1"], "must not be below 0"),
        (["--device", "4090", "--config", "memoryless", "--fit-memory"], "scales horizons; give some"),
        (["--device", "4090", "--data.num_lanes", "9000", "--fit-memory"], "do not fit rtx-4090-24gb"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *arguments]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
