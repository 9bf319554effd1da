"""Shared fixtures: tiny networks in float64, generated MIDI, and MAESTRO where it is."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from symusic import ControlChange, Note, Score, Tempo, Track
from torch import Tensor

from dsmr.attention import visibility
from dsmr.model import RecurrentTransformer

os.environ.setdefault("WANDB_MODE", "offline")
torch.set_num_threads(1)
LONG = (
    "test_trials_prepare.py",
    "test_trials_midi.py",
    "test_trials_resume.py",
    "test_reliability.py",
    "test_gpu_script.py",
    "test_trials_ddp.py",
    "test_generate.py",
    "test_sweep.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that no worker waits for them at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


def not_the_oldest_quarter(length_B1: Tensor, position_T: Tensor, horizon: int) -> int:
    """A rule from outside the package: one function, one entry in the table."""
    return horizon - horizon // 4


visibility.RULES["not_the_oldest_quarter"] = not_the_oldest_quarter
ALL_RULES = ("boundary", "sliding", "not_the_oldest_quarter")


def tiny_transformer(
    horizons: str = "1x16+1x4+1x0", segment_length: int = 8, vocab_size: int = 11, **changes: object
) -> RecurrentTransformer:
    """A float64 network of width 16, without dropout, whose weights are large enough to matter."""
    torch.manual_seed(0)
    sizes: dict = {"d_model": 16, "num_layers": 3, "num_heads": 2, "memory_block": 4, "dropout": 0.0}
    sizes |= {"init_std": 0.4, **changes}
    return RecurrentTransformer(vocab_size, horizons, segment_length, **sizes).double().eval()


def write_midi(path: Path, seed: int, *, num_notes: int = 60, program: int = 0, tempo: float = 120.0) -> Path:
    """A small piano piece with a pedal, as a file."""
    generator = torch.Generator().manual_seed(seed)
    score = Score(480)
    score.tempos.append(Tempo(0, tempo))
    track = Track("", program, False)
    time = 0
    for _ in range(num_notes):
        time += int(torch.randint(0, 400, (), generator=generator))
        pitch = int(torch.randint(30, 100, (), generator=generator))
        velocity = int(torch.randint(1, 127, (), generator=generator))
        track.notes.append(Note(time, int(torch.randint(1, 900, (), generator=generator)), pitch, velocity))
    for start in range(0, time, 2000):
        track.controls.append(ControlChange(start, 64, 127))
        track.controls.append(ControlChange(start + 1200, 64, 0))
    score.tracks.append(track)
    path.parent.mkdir(parents=True, exist_ok=True)
    score.dump_midi(path)
    return path


def trial_cases(short: Sequence[str], long: Sequence[str]) -> list[Any]:
    """Parameters of the fixture `outcome`: trials in their short form, and in their long one, which is marked slow."""
    cases = [pytest.param(("short", name), id=f"{name}-short") for name in short]
    return cases + [pytest.param(("long", name), id=f"{name}-long", marks=pytest.mark.slow) for name in long]


@functools.cache
def run_trials(script: str, size: str) -> dict[str, Any]:
    """Run a script of tests/trials once, in its own process; outcomes by name."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "outcomes.json"
        command = [sys.executable, str(Path(__file__).parent / "trials" / f"{script}.py"), "--output", str(found)]
        ended = subprocess.run(
            [*command, *(["--short"] if size == "short" else [])], capture_output=True, text=True, check=False
        )
        if found.is_file():
            return dict(json.loads(found.read_text()))
    return {"all": {"cases": 0, "failures": [ended.stderr]}}


@pytest.fixture
def outcome(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Outcome of one trial of the script that the module names in `TRIALS`."""
    size, name = request.param
    outcomes = run_trials(request.module.TRIALS, size)
    return dict(outcomes.get("all") or outcomes[name])


def experiment(name: str) -> ModuleType:
    """Import `experiments/NAME/run.py` as a module."""
    path = Path(__file__).parent.parent / "experiments" / name / "run.py"
    spec = importlib.util.spec_from_file_location(f"{name}_experiment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def midi_folder(tmp_path: Path) -> Path:
    """A folder of twelve pieces, some of them in a folder below it."""
    folder = tmp_path / "midi"
    for number in range(12):
        write_midi(folder / ("deep/er" if number % 3 else "") / f"piece{number}.mid", number)
    return folder


@pytest.fixture(scope="session")
def maestro() -> str:
    """Path of MAESTRO; skips the test without it."""
    path = os.environ.get("DSMR_MAESTRO")
    if not path:
        pytest.skip("DSMR_MAESTRO is not set: this test reads the real MAESTRO v3.0.0")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token stores of a test stay in its own folder."""
    monkeypatch.setenv("DSMR_CACHE", str(tmp_path / "cache"))
