"""A user's own schedule, network, optimizer, learning-rate schedule and callback, from fit to export."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from dsmr.cli import main
from dsmr.cli.lightning_cli import QUIET
from dsmr.generate import Generator
from dsmr.model import RecurrentTransformer, Schedule
from dsmr.model.backbone import Backbone, evaluation_copy
from dsmr.model.schedules import expand_horizons
from dsmr.results.run_files import read_checkpoint, read_run_section
from dsmr.results.runs import collect_results
from dsmr.share.description import check_rebuilds, network_class
from dsmr.share.loading import load_model
from dsmr.training.callbacks.throughput import Throughput

MODULE = '''
import os
import signal
from dataclasses import dataclass

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from dsmr.model import Backbone, Memory, RecurrentTransformer, Schedule, Update


@dataclass(frozen=True)
class Pyramid(Schedule):
    base: int = 256

    def horizons(self, num_layers):
        return tuple(self.base >> layer for layer in range(num_layers))


def not_the_oldest_quarter(length_B1, position_T, horizon):
    return horizon - horizon // 4


class Scaled(RecurrentTransformer):
    def __init__(self, vocab_size, horizons, segment_length, *, scale: float = 1.0, **sizes) -> None:
        super().__init__(vocab_size, horizons, segment_length, **sizes)
        self.scale = scale

    def config(self):
        return super().config() | {"scale": self.scale}

    def forward(self, tokens_BT, memory, is_start_B=None):
        logits_BTV, update = super().forward(tokens_BT, memory, is_start_B)
        return self.scale * logits_BTV, update


class Narrow(RecurrentTransformer):
    """One that fixes nearly everything, in its own words."""

    def __init__(self, vocab_size, horizons, segment_length, *, width: int = 32) -> None:
        super().__init__(
            vocab_size, horizons, segment_length, d_model=width, num_layers=2, num_heads=2, memory_block=64
        )
        self.width = width

    def config(self):
        kept = ("vocab_size", "horizons", "segment_length")
        return {key: super(Narrow, self).config()[key] for key in kept} | {"width": self.width}


@dataclass(frozen=True)
class Left(Update):
    hidden_1BE: torch.Tensor


class Kept(Memory):
    def __init__(self, network, num_lanes, decoding):
        sizes = {"num_lanes": num_lanes, "num_kv_heads": 1, "head_width": 1, "decoding": decoding}
        super().__init__([], segment_length=network.segment_length, **sizes)
        self.hidden_BE = torch.zeros(num_lanes, network.width)

    def commit(self, update):
        super().commit(update)
        self.hidden_BE = update.hidden_1BE[0].detach()

    def state_dict(self):
        return super().state_dict() | {"hidden_BE": self.hidden_BE}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.hidden_BE = state["hidden_BE"].clone()


class Gru(Backbone):
    """No Transformer at all; its constructor reads values, which no meta tensor has, and its weights are tied."""

    def __init__(self, vocab_size, horizons, segment_length, *, width: int = 24) -> None:
        super().__init__()
        if horizons is not None:
            raise ValueError("Gru has no horizons; set model.horizons to null")
        self.vocab_size, self.segment_length, self.width, self.horizons = vocab_size, segment_length, width, ()
        self.embedding, self.cell = nn.Embedding(vocab_size, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.ones(width), persistent=False)
        self.first = torch.linspace(0, 1, 3).tolist()[0]

    def config(self):
        kept = {"vocab_size": self.vocab_size, "segment_length": self.segment_length, "width": self.width}
        return kept | {"horizons": None}

    def init_memory(self, num_lanes, *, decoding=False):
        return Kept(self, num_lanes, decoding)

    def forward(self, tokens_BT, memory, is_start_B=None):
        hidden_BE, length_B = memory.hidden_BE, memory.length_B
        if is_start_B is not None:
            hidden_BE = hidden_BE.masked_fill(is_start_B[:, None], 0)
            length_B = length_B.masked_fill(is_start_B, 0)
        out_BTE, hidden_1BE = self.cell(self.embedding(tokens_BT), hidden_BE[None])
        return self.head(out_BTE * self.table), Left([], [], length_B, tokens_BT.shape[1], hidden_1BE)

    def state_bytes(self, num_lanes, itemsize, *, decoding=False):
        return itemsize * num_lanes * self.width

    def summary(self):
        return f"a GRU of width {self.width}"


class OwnDescent(torch.optim.SGD):
    def __init__(self, params, lr: float = 0.01) -> None:
        super().__init__(params, lr=lr)


class Halved(torch.optim.lr_scheduler.LambdaLR):
    def __init__(self, optimizer, every: int = 5) -> None:
        super().__init__(optimizer, lambda step: 0.5 ** (step // every))


class Stop(Callback):
    """Asks the process to stop, once."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 13:
            os.kill(os.getpid(), signal.SIGUSR1)


class Count(Callback):
    def __init__(self, name: str = "counted.txt") -> None:
        self.name, self.batches = name, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        with open(self.name, "w") as file:
            file.write(str(self.batches))
'''
FIT = ["--config", "smoke", "--trainer.enable_progress_bar", "false"]
OWN = {
    "schedule": ["--model.horizons", "ownparts.Pyramid", "--model.horizons.base", "256"],
    "rule": ["--model.backbone.rule", "ownparts.not_the_oldest_quarter"],
    "scaled": ["--model.backbone", "ownparts.Scaled", "--model.backbone.scale", "0.5"],
    "narrow": ["--model.backbone", "ownparts.Narrow", "--model.backbone.width", "48"],
    "gru": ["--model.horizons", "null", "--model.backbone", "ownparts.Gru", "--model.backbone.width", "16"],
    "trained": [
        *("--model.optimizer", "ownparts.OwnDescent", "--model.lr_scheduler", "ownparts.Halved"),
        *("--trainer.callbacks+", "ownparts.Count"),
    ],
}
NETWORKS = {"scaled": "ownparts.Scaled", "narrow": "ownparts.Narrow", "gru": "ownparts.Gru"}


def dsmr(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's folder: their module, a run of each of their classes, and an ordinary one."""
    made = tmp_path_factory.mktemp("own")
    (made / "ownparts.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("DSMR_CACHE", str(made / "cache"))
        patch.chdir(made)
        patch.syspath_prepend(made)
        assert dsmr("fit", *FIT, "--name", "ordinary") == 0
        for name, options in OWN.items():
            assert dsmr("fit", *FIT, *options, "--sample_every_n_steps", "10", "--name", name) == 0
        yield made
        sys.modules.pop("ownparts", None)


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's folder, with the program's own filters of warnings."""
    monkeypatch.chdir(folder)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)


def logged(run: Path, column: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


def last_json(capsys: pytest.CaptureFixture[str]) -> dict:
    found: dict = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def elsewhere(folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all runs where nothing of the user's can be imported."""
    shutil.copytree(folder / "runs", target)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in (str(folder), "")])
    for name in list(sys.modules):
        if name == "ownparts":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(target)
    return target


# what a run keeps of itself


def test_a_run_keeps_what_it_expanded_to(folder: Path) -> None:
    kept = {name: read_run_section(folder / "runs" / name) for name in ("ordinary", *OWN)}
    assert {name: section and section["horizons"] for name, section in kept.items()} == {
        "ordinary": [320, 64],
        "schedule": [256, 128],
        "rule": [320, 64],
        "scaled": [320, 64],
        "narrow": [320, 64],
        "gru": [],
        "trained": [320, 64],
    }
    for name, section in kept.items():
        assert section is not None
        assert section["backbone"] == NETWORKS.get(name, "RecurrentTransformer")
        assert section["segment_length"] == 64
        assert section["rule"] == ("ownparts.not_the_oldest_quarter" if name == "rule" else "boundary")
        for file in ("best.ckpt", "last.ckpt"):
            saved = read_checkpoint(folder / "runs" / name / file)["dsmr"]
            assert {key: saved[key] for key in section} == section
            assert saved["format_version"] == 2


def test_a_report_needs_no_class_of_the_users_and_draws_every_schedule(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = elsewhere(folder, tmp_path / "runs", monkeypatch)
    assert dsmr("report", runs, "--json", "--format", "svg") == 0
    result = last_json(capsys)
    assert not result["unread"]
    shown = {run["name"]: run.get("horizons") for run in result["runs"]}
    assert shown == dict.fromkeys(OWN, "1x320+1x64") | {
        "ordinary": "1x320+1x64",
        "schedule": "1x256+1x128",
        "gru": None,
    }
    picture = (runs / "report" / "schedules.svg").read_text()
    assert "<!-- schedule -->" in picture
    assert "ownparts" not in sys.modules


def test_runs_of_earlier_versions_tell_their_horizons_by_a_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = elsewhere(folder, tmp_path / "runs", monkeypatch)
    for run in runs.iterdir():
        (run / "run.json").unlink()
        for file in run.glob("*.ckpt"):  # format 2 as it was written before
            content = torch.load(file, weights_only=True)
            for key in ("horizons", "segment_length", "vocab_size"):
                del content["dsmr"][key]
            torch.save(content, file)
    found = {run.name: run.horizons for run in collect_results(runs).runs}
    assert found["schedule"] == (256, 128)
    assert found["gru"] is None
    (runs / "schedule" / "best.ckpt").write_bytes(b"damaged")
    assert {run.name: run.horizons for run in collect_results(runs).runs}["schedule"] == (256, 128)  # the last one
    (runs / "schedule" / "last.ckpt").unlink()
    for name in ("ordinary", "schedule"):
        (runs / name / "best.ckpt").unlink()
    found = {run.name: run.horizons for run in collect_results(runs).runs}
    assert found["ordinary"] == (320, 64)  # a text in the config expands without any class
    assert found["schedule"] is None


def test_a_run_of_the_first_version_tells_its_horizons(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parent / "data" / "version1", tmp_path / "first")
    (run,) = collect_results(tmp_path).runs
    assert run.section is not None
    assert run.horizons == load_model(tmp_path / "first").backbone.horizons
    assert run.rule == "boundary"


def test_one_broken_run_is_listed_and_the_others_are_shown(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {
        "list": ("config.yaml", "[1, 2]", "has no settings of model"),
        "partial": ("config.yaml", "model: {}\ndata: {}", "has no settings of trainer"),
        "yaml": ("config.yaml", "a: [", "expected"),
        "tags": ("config.yaml", "model: !!python/object:os.system {}", "could not determine a constructor"),
        "lanes": ("config.yaml", "model: {}\ndata: {num_lanes: [4]}\ntrainer: {}", "TypeError"),
        "columns": ("metrics.csv", "loss\n1.0\n", "KeyError: 'step'"),
        "cells": ("metrics.csv", "step,loss\n1,2,3\n", "TypeError"),
        "bytes": ("metrics.csv", b"\xff\xfe\x00", "codec"),
        "described": ("run.json", "[]", "does not describe a run"),
        "cut": ("run.json", "{", "Expecting"),
        "horizons": ("run.json", '{"horizons": ["much"], "config": {}}', "much"),
        "table": ("pieces.csv", "odd\n1\n", "pieces.csv"),
    }
    for name, (file, content, _) in broken.items():
        shutil.copytree(folder / "runs" / "ordinary", tmp_path / name)
        (tmp_path / name / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    shutil.copytree(folder / "runs" / "schedule", tmp_path / "good")
    benchmark = {"hardware": {}, "rows": [{}], "config": {}, "absent": {}}
    (tmp_path / "speed.json").write_text(json.dumps(benchmark))
    assert dsmr("report", tmp_path, "--json") == 0
    result = last_json(capsys)
    assert [run["name"] for run in result["runs"]] == ["good"]
    assert set(result["unread"]) == {*broken, "speed"}
    text = (tmp_path / "report" / "README.md").read_text()
    for name, (_, _, said) in broken.items():
        assert said in result["unread"][name]
        assert f"{name} could not be read: {result['unread'][name]}" in text


# the whole chain


@pytest.mark.parametrize("name", OWN)
def test_every_command_takes_a_run(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "runs" / name
    assert (run / "samples" / "step-0000010.mid").is_file()
    assert dsmr("validate", "--checkpoint", run, "--json") == 0
    assert last_json(capsys)["metrics"]["val/perplexity"] == pytest.approx(
        min(logged(run, "val/perplexity")), rel=1e-5
    )
    assert dsmr("test", "--checkpoint", run) == 0
    assert dsmr("generate", "--checkpoint", run, "--seconds", "1", "--output", tmp_path / "a.mid") == 0
    limited = ["--prompt", "validation", "--limit", "1", "--prompt_seconds", "2", "--output", tmp_path / "many"]
    assert dsmr("generate", "--checkpoint", run, "--seconds", "1", *limited) == 0
    capsys.readouterr()
    status = dsmr("analyze", "--checkpoint", run, "--folder", tmp_path / "analysis", "--json")
    if name == "gru":
        assert status == 2
        assert "ownparts.Gru is not made of dsmr's layers" in capsys.readouterr().err
    else:
        assert status == 0
        horizons = [layer["horizon"] for layer in last_json(capsys)["layers"]]
        assert horizons == ([256, 128] if name == "schedule" else [320, 64])
        assert dsmr("validate", "--checkpoint", run, "--model.horizons", "2x0") == 0
        output = ["--output", tmp_path / "b.mid"]
        assert dsmr("generate", "--checkpoint", run, "--horizons", "2x64", "--seconds", "1", *output) == 0


def test_a_schedule_that_has_changed_since_changes_no_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(folder / "runs" / "schedule", tmp_path / "run")
    pyramid = sys.modules["ownparts"].Pyramid
    monkeypatch.setattr(pyramid, "horizons", lambda self, num_layers: (self.base,) * num_layers)
    best = min(logged(run, "val/perplexity"))
    assert dsmr("validate", "--checkpoint", run, "--json") == 0
    result = last_json(capsys)
    assert result["horizons"] == [256, 128]
    assert result["metrics"]["val/perplexity"] == pytest.approx(best, rel=1e-5)
    assert dsmr("validate", "--checkpoint", run, "--model.horizons.base", "128", "--json") == 0  # as it is now
    assert last_json(capsys)["horizons"] == [128, 128]
    assert dsmr("analyze", "--checkpoint", run) == 0
    assert dsmr("fit", "--resume", run, "--trainer.max_steps", "22") == 0
    assert dsmr("report", tmp_path, "--json") == 0
    assert [found["horizons"] for found in last_json(capsys)["runs"]] == ["1x256+1x128"]


@pytest.mark.parametrize("name", OWN)
def test_a_run_resumes_as_if_it_had_never_stopped(name: str, folder: Path, tmp_path: Path) -> None:
    options = [*FIT, *OWN[name], "--root", tmp_path]
    assert dsmr("fit", *options, "--trainer.max_steps", "30", "--name", "whole") == 0
    stop = ["--trainer.max_steps", "30", "--trainer.callbacks+", "ownparts.Stop"]
    assert dsmr("fit", *options, *stop, "--name", "cut") == 128 + signal.SIGUSR1
    assert read_checkpoint(tmp_path / "cut" / "last.ckpt")["global_step"] == 13
    assert dsmr("fit", "--resume", tmp_path / "cut") == 0
    weights = [read_checkpoint(tmp_path / run / "last.ckpt")["state_dict"] for run in ("whole", "cut")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert logged(tmp_path / "whole", "train/nll") == logged(tmp_path / "cut", "train/nll")


@pytest.mark.parametrize("name", OWN)
def test_an_exported_model_says_what_must_come_along(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = folder / "runs" / name, tmp_path / "model"
    assert dsmr("export", run, model) == 0
    description = json.loads((model / "config.json").read_text())
    needs = {
        "trained": ["ownparts.OwnDescent", "ownparts.Halved"],
        "schedule": [],
        "rule": ["ownparts.not_the_oldest_quarter"],
    }.get(name, [NETWORKS.get(name)])
    assert description["needs"] == needs
    card = (model / "README.md").read_text()
    assert ("not part of dsmr" in card) == bool(needs)
    assert all(f"`{need}`" in card for need in [*needs, *(["ownparts"] if needs else [])])
    assert description["parameters"] == sum(p.numel() for p in load_model(run).backbone.parameters())
    first, second = (Generator.load(path) for path in (run, model))
    assert next(first.tokens(seed=3)) == next(second.tokens(seed=3))
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        logits = [made.backbone(ids, made.backbone.init_memory(1, decoding=True))[0] for made in (first, second)]
    assert torch.equal(*logits)
    capsys.readouterr()
    assert dsmr("validate", "--checkpoint", model) == 0
    settings = yaml.safe_load((model / "config.yaml").read_text())
    assert settings["model"]["horizons"] == {"schedule": "1x256+1x128", "gru": None}.get(name, "1x320+1x64")
    elsewhere(folder, tmp_path / "away", monkeypatch)
    capsys.readouterr()
    status = dsmr("generate", "--checkpoint", model, "--seconds", "1", "--output", tmp_path / "c.mid")
    error = capsys.readouterr().err
    assert status == (2 if name in {*NETWORKS, "rule"} else 0)
    if name == "rule":
        assert "rule 'ownparts.not_the_oldest_quarter' is not one of boundary, sliding" in error
        assert "No module named 'ownparts'" in error
    if name in NETWORKS:
        assert error.count("\n") == 1
        assert f"{NETWORKS[name]} is not part of dsmr" in error
        assert "module ownparts cannot be used (No module named 'ownparts')" in error
        assert "run this in the folder that has ownparts" in error
    if name == "schedule":
        assert dsmr("validate", "--checkpoint", model) == 0


@pytest.mark.parametrize("name", OWN)
def test_a_configuration_is_estimated(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dsmr("estimate", "--config", "smoke", *OWN[name], "--json") == 0
    result = last_json(capsys)
    network = load_model(folder / "runs" / name).backbone
    assert result["parameters"] == sum(p.numel() for p in network.parameters())
    assert result["state_bytes"] == network.state_bytes(4, 4)
    assert ("note" in result) == (name in NETWORKS)
    assert ("flops_per_token" in result) == (name != "gru")
    assert bool(result["rows"]) == (name != "gru")
    device = ["--device", "rtx-3060-12gb", "--fit-memory"]
    assert dsmr("estimate", "--config", "smoke", *OWN[name], *device) == (2 if name == "gru" else 0)
    if name == "gru":
        assert "ownparts.Gru is not made of dsmr's layers" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["narrow", "gru"])
def test_a_benchmark_has_the_sizes_or_says_why_not(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--benchmark.rows", "[full]", "--benchmark.materialised", "[]", "--benchmark.decode_tokens", "0"]
    settings += ["--benchmark.repeats", "1", "--benchmark.warmup", "0"]
    status = dsmr("benchmark", "--config", "smoke", *OWN[name], *settings, "--json")
    if name == "gru":
        assert status == 2
        assert "ownparts.Gru is not made of dsmr's layers" in capsys.readouterr().err
    else:
        assert status == 0
        assert last_json(capsys)["config"]["d_model"] == 48


def test_a_sweep_ends_with_its_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = {
        "program": "dsmr",
        "method": "grid",
        "parameters": {
            "model.horizons": {"values": ["2x64", "ownparts.Pyramid"]},
            "model.backbone": {"values": ["ownparts.Scaled"]},
            "model.backbone.rule": {"value": "ownparts.not_the_oldest_quarter"},
        },
        "command": ["dsmr", "fit", "${args}"],
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(sweep))
    few = ["--trainer.max_steps", "5", "--trainer.val_check_interval", "5"]
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "dsmr", "sweep", str(tmp_path / "own.yaml"), "--local", "--root", str(tmp_path)]
    ended = subprocess.run(
        [*command, *FIT, *few, "--json"], env=environment, capture_output=True, text=True, cwd=folder, check=False
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert [trial["status"] for trial in result["trials"]] == ["done", "done"]
    assert {trial["horizons"] for trial in result["trials"]} == {"2x64", "1x256+1x128"}
    assert "| 1x256+1x128 | 5 |" in (tmp_path / "own" / "README.md").read_text()
    assert dsmr("sweep", tmp_path / "own.yaml", "--dry-run", *FIT, "--trainer.max_steps", "5", "--json") == 0
    assert {trial["budget"] for trial in last_json(capsys)["trials"]} == {128, 384}


def test_a_process_of_its_own_finds_the_module_in_the_current_folder(folder: Path, tmp_path: Path) -> None:
    def run(*arguments: object, cwd: Path = folder) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dsmr", *map(str, arguments)]
        paths = [path for path in sys.path if path not in (str(folder), "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd, check=False)

    model, options = folder / "runs" / "gru", ["--seconds", "1", "--output", tmp_path / "a.mid"]
    assert run("generate", "--checkpoint", model, *options).returncode == 0
    assert (tmp_path / "a.mid").is_file()
    refused = run("generate", "--checkpoint", model, "--seconds", "1", "--output", tmp_path / "b.mid", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "module ownparts cannot be used" in refused.stderr
    assert not (tmp_path / "b.mid").exists()


# what is refused, and when


def network(kind: type[Backbone], **settings: object) -> Backbone:
    return kind(392, "2x8", 8, d_model=16, num_layers=2, num_heads=2, memory_block=8, **settings)  # type: ignore[call-arg]


class Forgets(RecurrentTransformer):
    def __init__(
        self, vocab_size: int, horizons: str, segment_length: int, *, scale: float = 1.0, **sizes: int
    ) -> None:
        super().__init__(vocab_size, horizons, segment_length, **sizes)  # type: ignore[arg-type]
        self.scale = scale


class Renames(RecurrentTransformer):
    def __init__(self, vocab_size: int, horizons: str, segment_length: int, *, d_model: int, **sizes: int) -> None:
        super().__init__(vocab_size, horizons, segment_length, d_model=2 * d_model, **sizes)


class Unkept(Forgets):
    def config(self) -> dict:
        return super().config() | {"scale": torch.tensor(self.scale)}


class Strange(Forgets):
    def config(self) -> dict:
        return super().config() | {"scale": self.scale, "other": 1}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Forgets, "takes scale, but its config\\(\\) omits this"),
        (Renames, "becomes another network"),
        (Unkept, "holds scale = .* \\(Tensor\\), which a checkpoint cannot store"),
        (Strange, "cannot be rebuilt from its config\\(\\) .*other"),
    ],
)
def test_a_network_that_no_checkpoint_could_rebuild_is_refused(kind: type[Backbone], said: str) -> None:
    before = torch.get_rng_state()
    made = network(kind)
    torch.set_rng_state(before)
    with pytest.raises(ValueError, match=said):
        check_rebuilds(made)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_inside_a_function_is_refused() -> None:
    class Hidden(RecurrentTransformer):
        pass

    with pytest.raises(ValueError, match="at the top of a module"):
        check_rebuilds(network(Hidden))
    check_rebuilds(network(RecurrentTransformer, memory_gate=-1.0))


def test_a_fit_refuses_it_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "forgetful.py").write_text(MODULE.replace('| {"scale": self.scale}', ""))
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--model.backbone", "forgetful.Scaled", "--root", tmp_path, "--name", "refused"]
    assert dsmr("fit", *FIT, *options) == 2
    assert "forgetful.Scaled takes scale, but its config() omits this" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_a_class_that_is_not_a_network_or_has_changed_is_told_in_a_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "runs" / "scaled" / "best.ckpt"
    section = read_checkpoint(path)["dsmr"]
    with pytest.raises(ValueError, match=r"ownparts.Pyramid is not a network"):
        network_class(section | {"backbone": "ownparts.Pyramid"}, path)
    with pytest.raises(ValueError, match=r"cannot be used .*has no attribute 'Gone'"):
        network_class(section | {"backbone": "ownparts.Gone"}, path)
    (tmp_path / "brokenparts.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"module brokenparts cannot be used \(division by zero\)"):
        network_class(section | {"backbone": "brokenparts.Mine"}, path)
    monkeypatch.setattr(sys.modules["ownparts"], "Scaled", sys.modules["ownparts"].Narrow)
    with pytest.raises(ValueError, match=r"does not fit the current network ownparts.Scaled"):
        load_model(path)


def test_a_checkpoint_with_only_the_class_is_found_by_the_runs_settings(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "runs" / "scaled", tmp_path / "run")
    for file in run.glob("*.ckpt"):
        content = torch.load(file, weights_only=True)
        content["dsmr"]["backbone"] = "Scaled"
        torch.save(content, file)
    assert type(load_model(run).backbone).__qualname__ == "Scaled"
    assert dsmr("validate", "--checkpoint", run) == 0
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match="unknown network 'Scaled'"):
        load_model(run)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("absent.Pyramid", "its module absent cannot be used (No module named 'absent'); run this in the folder that"),
        ("ownparts.Absent", "has no attribute 'Absent'"),
        ("ownparts.Scaled", "ownparts.Scaled is not a schedule"),
        ("wrongparts.Pyramid", "invalid syntax"),
        ("2x3.5", "is not LAYERSxTOKENS"),
    ],
)
def test_a_class_path_that_is_no_schedule_is_not_taken_for_a_text(
    given: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrongparts.py").write_text("def (")
    monkeypatch.syspath_prepend(tmp_path)
    assert dsmr("fit", *FIT, "--model.horizons", given, "--root", tmp_path, "--name", "refused") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((64, 64, 64), r"returned \(64, 64, 64\); it must return 2 numbers"),
        ((64, -64), "none negative"),
        ((64.0, 64.0), "whole numbers"),
        (128, "whole numbers"),
        (ValueError("base is too small"), "base is too small"),
    ],
)
def test_a_schedule_that_gives_no_horizons_is_refused(given: object, said: str) -> None:
    class Odd(Schedule):
        def horizons(self, num_layers: int) -> tuple[int, ...]:
            if isinstance(given, Exception):
                raise given
            return given  # type: ignore[return-value]

    with pytest.raises(ValueError, match=said) as caught:
        expand_horizons(Odd(), 2)
    assert caught.traceback[-1].path.name == "schedules.py"  # which is told in one line


def test_whole_numbers_of_numpy_become_pythons() -> None:
    class Numbers(Schedule):
        def horizons(self, num_layers: int) -> tuple[int, ...]:
            return torch.full((num_layers,), 64).numpy()  # type: ignore[return-value]

    expanded = expand_horizons(Numbers(), 3)
    assert expanded == (64, 64, 64)
    assert {type(tokens) for tokens in expanded} == {int}


def test_the_share_of_a_peak_is_left_out_where_operations_are_not_known(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3090")
    trainer = SimpleNamespace(precision="bf16-mixed", world_size=1)

    def share(run: str) -> dict[str, float]:
        backbone = load_model(folder / "runs" / run).backbone
        model = SimpleNamespace(device=SimpleNamespace(type="cuda"), backbone=backbone)
        return Throughput._peak_share(trainer, model, 1000.0)  # type: ignore[arg-type]

    assert share("scaled")["perf/peak_flops_share"] > 0
    assert share("gru") == {}


def test_a_twin_of_a_users_network_needs_neither_its_config_nor_meta_tensors(folder: Path) -> None:
    for name in NETWORKS:
        backbone = load_model(folder / "runs" / name).backbone
        made = evaluation_copy(backbone)
        ids = torch.arange(4, 40)[None]
        with torch.no_grad():
            pair = [one(ids, one.init_memory(1, decoding=True))[0] for one in (backbone, made)]
        assert torch.equal(*pair)
        assert all(mine is theirs for mine, theirs in zip(made.parameters(), backbone.parameters(), strict=True))
