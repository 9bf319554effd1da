"""The unattended GPU script, on a CPU at a tiny size: it continues, repeats nothing, and leaves JSON at once."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "experiments" / "gpu" / "run.py"


def call(tmp_path: Path, out: str, *more: str) -> str:
    folders = ["--out", str(tmp_path / out), "--state", str(tmp_path / "state")]
    command = [sys.executable, str(SCRIPT), "--dry-run", *folders, *more]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def content(path: Path) -> dict:
    return json.loads(path.read_text())


def test_calls_continue_each_other_to_the_end(tmp_path: Path) -> None:
    assert "to do: nothing" in call(tmp_path, "first", "--only", "train_two_scale")
    first = content(tmp_path / "first" / "train_two_scale.json")
    assert first["exit_status"] == 0
    assert first["validation"]["metrics"]["val/perplexity"] > 1

    # the same run, asked to go further: it goes on from its last checkpoint
    (tmp_path / "state" / "train_two_scale.json").unlink()
    call(tmp_path, "second", "--only", "train_two_scale", "--tokens", str(12 * 256))
    log = (tmp_path / "state" / "train_two_scale.log").read_text()
    assert log.count("--resume") == 1
    assert content(tmp_path / "second" / "train_two_scale.json")["exit_status"] == 0

    assert "to do: nothing" in call(tmp_path, "third")
    assert {path.name for path in (tmp_path / "third").iterdir()} == {
        "tests.json",
        "benchmark.json",
        "train_full.json",
    }
    assert content(tmp_path / "third" / "tests.json")["exit_status"] == 0
    found = content(tmp_path / "third" / "benchmark.json")
    names = ["full", "two_scale", "memoryless", "materialised_full", "perceiver_ar", "x_transformers_xl"]
    assert [row["name"] for row in found["rows"]] == [name for name in names if name not in found["absent"]]
    assert "to do: nothing" in call(tmp_path, "fourth")
    assert not list((tmp_path / "fourth").iterdir())


def test_a_step_that_fails_is_told_and_not_taken_for_done(tmp_path: Path) -> None:
    run = tmp_path / "state" / "runs" / "full"
    run.mkdir(parents=True)
    (run / "last.ckpt").write_bytes(b"")
    assert "to do: train_full" in call(tmp_path, "out", "--only", "train_full")
    assert "EOFError" in content(tmp_path / "out" / "train_full.json")["error"]
    assert not (tmp_path / "state" / "train_full.json").exists()
