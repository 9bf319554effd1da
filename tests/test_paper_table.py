"""The study of when memory begins to pay, tiny: stopping to be validated changes nothing, differences are paired."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from conftest import experiment
from dsmr.cli.lightning_cli import DsmrCLI
from dsmr.results.piece_table import PieceTable
from dsmr.results.plotting import make_panels


@pytest.fixture
def script() -> ModuleType:
    return experiment("paper_table")


@pytest.fixture
def study(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script
    rows = {"two_scale": ["--model.horizons=2x64"], "memoryless": ["--model.horizons=2x0"]}
    monkeypatch.setattr(module, "STAGES", (6, 12))
    monkeypatch.setattr(module, "ROUGH", 1)
    monkeypatch.setattr(module, "TOKENS_PER_STEP", 256)
    monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(module, "options", lambda row, seed: tiny(rows[row], seed))
    return module


def tiny(row: list[str], seed: int) -> list[str]:
    pieces = "--data.recall.num_validation=12"  # as many as an interval needs
    return ["--config", "smoke", f"--seed_everything={seed}", *row, pieces, "--model.lr_scheduler.total_steps=12"]


def test_rows_have_one_budget_and_one_learning_rate(script: ModuleType) -> None:
    budgets = {}
    for row in script.ROWS:
        cli = DsmrCLI("fit", [*script.options(row, 3), "--trainer.logger=false"])
        assert cli.config.model.lr_scheduler.init_args.total_steps == script.STAGES[-1]
        assert cli.config.seed_everything == 3
        budgets[row] = sum(cli.model.backbone.horizons)
        assert len(cli.model.backbone.horizons) == 4
        assert cli.datamodule.num_lanes * cli.datamodule.segment_length == script.TOKENS_PER_STEP
    assert budgets.pop("full") == 4 * budgets["two_scale"]
    assert budgets.pop(script.BASELINE) == 0
    assert set(budgets.values()) == {2048}


def test_only_intervals_that_hold_are_drawn(script: ModuleType) -> None:
    figure, (axes,) = make_panels(1, height=2.0, columns=1)
    bars = [{"value": 1.0, "low": 0.5, "high": 2.0}, {"value": 1.0, "low": None, "high": None}]
    script.draw_intervals(axes, [10.0, 20.0], bars, "#222222")
    script.draw_intervals(axes, [20.0], bars[1:], "#222222")
    (lines,) = axes.collections
    assert [segment.tolist() for segment in lines.get_segments()] == [[[10.0, 0.5], [10.0, 2.0]]]
    figure.clear()


def test_stages_are_those_of_one_run(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "runs"
    monkeypatch.setattr(sys, "argv", ["run.py", "--root", str(root), "--output", str(tmp_path)])
    study.main()
    left_alone = [*tiny(study.ROWS["two_scale"], 0), "--trainer.max_steps=12", "--trainer.val_check_interval=12"]
    command = [sys.executable, "-m", "dsmr", "fit", *left_alone, f"--root={tmp_path}", "--name=alone"]
    subprocess.run([*command, "--trainer.enable_progress_bar=false"], check=True, capture_output=True)
    alone = PieceTable.read(tmp_path / "alone" / "pieces.csv")

    found = json.loads((tmp_path / "results.json").read_text())["rows"]
    stages = found["two_scale"]["stages"]
    assert [stage["tokens"] for stage in stages] == [6 * 256, 12 * 256]
    last = stages[-1]["nats_per_note"]["value"]
    assert last == pytest.approx(alone.nll_P.sum() / alone.notes_P.sum(), rel=1e-6)
    assert last < stages[0]["nats_per_note"]["value"]

    forgetful = tmp_path / "forgetful.csv"
    command = [sys.executable, "-m", "dsmr", "validate", "--checkpoint", str(root / "two_scale_seed0" / "last.ckpt")]
    subprocess.run([*command, "--model.horizons=2x0", f"--pieces={forgetful}"], check=True, capture_output=True)
    without = PieceTable.read(forgetful)
    saved = found["two_scale"]["nats_per_note_without_memory_less_with"]["value"]
    assert saved == pytest.approx(without.nll_P.sum() / without.notes_P.sum() - last, rel=1e-4)
    assert abs(saved) > 1e-4

    own, other = (PieceTable.read(root / "pieces" / f"{row}_seed0.csv") for row in study.ROWS)
    by_position = found["two_scale"][study.BY_POSITION]
    assert [int(start) for start in by_position] == list(own.starts)
    expected = (own.nll_PK.sum(axis=0) - other.nll_PK.sum(axis=0)) / own.tokens_PK.sum(axis=0)
    assert [bar["value"] for bar in by_position.values()] == pytest.approx(list(expected))

    whole = {row: found[row]["whole"]["nats_per_note"]["value"] for row in found}
    paired = found["two_scale"]["whole"]["less_memoryless"]
    assert paired["value"] == pytest.approx(whole["two_scale"] - whole["memoryless"], abs=1e-9)
    assert paired["low"] < paired["value"] < paired["high"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("cpu-tokens.png", "cpu-positions.png"))

    # what is done stays done
    metrics = (root / "two_scale_seed0" / "metrics.csv").read_bytes()
    (tmp_path / "results.json").unlink()
    study.main()
    assert (root / "two_scale_seed0" / "metrics.csv").read_bytes() == metrics
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == found
