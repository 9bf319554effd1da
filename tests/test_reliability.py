"""What a run survives: short forms of experiments/reliability, and what checkpoints of earlier versions hold."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dsmr import checkpoint as checkpoints
from dsmr.cli import main
from dsmr.cli.lightning import QUIET

TRIALS = Path(__file__).parent.parent / "experiments" / "reliability"
VERSION_1 = Path(__file__).parent / "data" / "version1"


@pytest.fixture(autouse=True)
def lightnings_own_warnings() -> None:
    """Keep the program's own filters inside a test."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)


def trial(name: str, folder: Path, *options: str) -> dict:
    """Run a trial in a process of its own; gives what it found."""
    found = folder / f"{name}.json"
    command = [sys.executable, str(TRIALS / f"{name}.py"), "--short", "--output", str(found), *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.is_file(), ended.stderr
    return json.loads(found.read_text())


def test_a_run_that_is_killed_in_a_step_a_checkpoint_or_a_validation_ends_bitwise_alike(tmp_path: Path) -> None:
    for name, outcome in trial("resume", tmp_path).items():
        assert outcome["cases"] >= 1, name
        assert outcome["failures"] == [], name


def test_a_version_1_checkpoint_gives_its_recorded_logits() -> None:
    """Of tokens (7 * i) % 392 in two lanes of two segments, every eighth position; recorded by version 0.1.0."""
    loaded = checkpoints.load(VERSION_1)
    assert checkpoints.read(loaded.path)["dsmr"]["format_version"] == 1
    assert loaded.tokenizer == {"name": "performance", "config": {}}
    tokens_BT = (torch.arange(2 * 64) * 7 % 392).view(2, 64)
    memory, is_start_B = loaded.backbone.init_memory(2), torch.ones(2, dtype=torch.bool)
    logits = []
    with torch.no_grad():
        for segment_BT in tokens_BT.split(32, dim=1):
            logits_BTV, update = loaded.backbone(segment_BT, memory, is_start_B)
            memory.commit(update)
            logits.append(logits_BTV)
            is_start_B = torch.zeros(2, dtype=torch.bool)
    recorded = torch.from_numpy(np.load(VERSION_1 / "logits.npy"))
    torch.testing.assert_close(torch.cat(logits, dim=1)[:, ::8], recorded, atol=1e-5, rtol=1e-5)


def test_a_version_1_run_goes_on(tmp_path: Path) -> None:
    run = shutil.copytree(VERSION_1, tmp_path / "version1")
    before = (run / "metrics.csv").read_text().splitlines()
    assert main(["fit", "--resume", str(run), "--trainer.max_steps", "16"]) == 0
    after = checkpoints.read(run / "last.ckpt")
    assert (after["global_step"], after["dsmr"]["format_version"]) == (16, checkpoints.FORMAT_VERSION)
    assert len((run / "metrics.csv").read_text().splitlines()) == len(before) + 4
