"""The unattended GPU script, on a CPU at a tiny size: it continues, repeats nothing, and leaves JSON at once."""

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from conftest import experiment

SCRIPT = Path(__file__).resolve().parent.parent / "experiments" / "gpu" / "run.py"


def call(tmp_path: Path, out: str, *more: str) -> str:
    folders = ["--out", str(tmp_path / out), "--state", str(tmp_path / "state")]
    command = [sys.executable, str(SCRIPT), "--dry-run", *folders, *more]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_calls_continue_each_other_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "state" / "runs" / "full").mkdir(parents=True)  # begun and cut off: nothing to be compared with yet
    assert "to do: nothing" in call(tmp_path, "first", "--only", "train_two_scale")
    assert (tmp_path / "first" / "report.tar.gz").is_file()
    assert results(tmp_path / "first")["machine"]["cpu_cores"] >= 1
    first = results(tmp_path / "first")["train_two_scale"]
    assert first["exit_status"] == 0
    assert first["validation"]["metrics"]["val/perplexity"] > 1

    # the same run, asked to go further: it goes on from its last checkpoint
    (tmp_path / "state" / "train_two_scale.json").unlink()
    call(tmp_path, "second", "--only", "train_two_scale", "--tokens", str(12 * 256))
    log = (tmp_path / "state" / "train_two_scale.log").read_text()
    assert log.count("--resume") == 1
    assert results(tmp_path / "second")["train_two_scale"]["exit_status"] == 0

    assert "to do: nothing" in call(tmp_path, "third")
    third = results(tmp_path / "third")
    probes = ["probe_adamw_3e-4", "probe_muon_1e-3"]
    assert list(third) == [
        *("machine", "tests", "benchmark", "profile_two_scale", "profile_full", *probes),
        *("train_full", "test_two_scale", "test_full", "generate", "export"),
    ]
    assert all(third[step]["exit_status"] == 0 for step in third if step not in ("machine", "benchmark"))
    names = ["full", "two_scale", "memoryless", "materialised_full", "perceiver_ar", "x_transformers_xl"]
    found = third["benchmark"]
    assert [row["name"] for row in found["rows"]] == [name for name in names if name not in found["absent"]]
    assert any("run_training_batch" in line for line in third["profile_full"]["table"])
    assert third["generate"]["lanes"]["8"]["tokens"] == [20]
    assert third["export"]["bytes"]["model.safetensors"] > 1000
    # the first row was trained before any probe: the others are trained like it
    assert third["train_full"]["probe"] is None
    with tarfile.open(tmp_path / "third" / "report.tar.gz") as packed:
        text = packed.extractfile("report/README.md").read().decode()
    assert "better" in text
    assert "to do: nothing" in call(tmp_path, "fourth")
    assert not (tmp_path / "fourth" / "results.json").exists()


def test_a_step_that_fails_is_told_and_not_taken_for_done(tmp_path: Path) -> None:
    run = tmp_path / "state" / "runs" / "full"
    run.mkdir(parents=True)
    (run / "last.ckpt").write_bytes(b"")
    assert "to do: train_full" in call(tmp_path, "out", "--only", "train_full")
    assert "torch.save" in results(tmp_path / "out")["train_full"]["error"]
    assert (tmp_path / "state" / "train_full.failed").read_text().count("\n") == 1
    assert not (tmp_path / "state" / "train_full.json").exists()


def test_what_has_failed_comes_last_and_then_not_at_all(tmp_path: Path) -> None:
    script = experiment("gpu")
    made = script.Call(tmp_path, tmp_path, time.monotonic() + 60, True, 1, None)
    names = ["tests", "benchmark", "export"]
    assert script.in_order(made, names, []) == names
    made.leave("tests", {"exit_status": 1}, done=False)
    made.leave("export", {"exit_status": 0}, done=False, failed=False)
    assert script.in_order(made, names, []) == ["benchmark", "export", "tests"]
    made.leave("tests", {"exit_status": 1}, done=False)
    assert script.in_order(made, names, []) == ["benchmark", "export"]
    assert script.in_order(made, names, ["tests"]) == ["tests"]
    late = script.Call(tmp_path, tmp_path, time.monotonic() - 1, True, 1, None)
    late.leave("benchmark", {"exit_status": 124}, done=False)  # which had no more time
    assert script.in_order(made, names, []) == ["benchmark", "export"]
    made.leave("benchmark", {"rows": []})
    assert script.in_order(made, names, []) == ["export"]
