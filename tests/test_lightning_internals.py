"""Lightning's private attributes: used in one file only, and still present in the installed Lightning."""

import ast
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.logger import Logger

import dsmr
from dsmr.training import lightning_internals as internals
from test_module import fresh, trainer

ROOT = Path(dsmr.__file__).parent
MOVED = f"Lightning {lightning.__version__} has moved what dsmr.training.lightning_internals.%s needs"


def private_names() -> set[str]:
    """Return the names of all private attributes and methods of the classes of Lightning that we use or extend."""
    classes = (Callback, LightningCLI, LightningDataModule, LightningModule, Logger, ModelCheckpoint, Timer, Trainer)
    names = {*vars(LightningModule()), *vars(LightningDataModule()), *vars(ModelCheckpoint())}
    run = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    names |= {*vars(run), *vars(run.fit_loop), *vars(run.fit_loop.epoch_loop)}
    parts = (*classes, TorchCheckpointIO, type(run.fit_loop), type(run.fit_loop.epoch_loop), type(run.strategy))
    for cls in parts:
        for base in cls.__mro__:
            if base.__module__.startswith("lightning."):
                names |= {*vars(base)}
    private = {name for name in names if name.startswith("_") and not name.startswith("__")}
    return private - {*vars(torch.nn.Module())} - {*vars(torch.nn.Module)}


def test_nothing_private_to_lightning_is_used_elsewhere() -> None:
    private = private_names()
    assert {"_trainer", "_should_check_val_fx", "_data_fetcher"} <= private
    found = []
    for path in ROOT.rglob("*.py"):
        if path.name == "lightning_internals.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in private:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} uses {node.attr}")
    assert not found, "move it into training/lightning_internals.py, or rename it if it is ours"


class Probe(Callback):
    """Asks for the trainer's state in the hooks where `LastCheckpoint` does."""

    def __init__(self) -> None:
        self.seen: dict[str, list[bool]] = {"due": [], "batch end": [], "batch start": [], "epoch end": []}
        self.checkpoint: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.seen["batch start"].append(internals.is_batch_ending(trainer))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen["batch end"].append(internals.is_batch_ending(trainer) and not internals.is_epoch_ending(trainer))
        self.seen["due"].append(internals.is_validation_due(trainer))

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen["epoch end"].append(internals.is_epoch_ending(trainer))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.checkpoint = checkpoint


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    probe, folder = Probe(), tmp_path_factory.mktemp("probe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSMR_CACHE", str(folder / "cache"))
        run = trainer(folder, max_steps=6, limit_train_batches=6, val_check_interval=3, callbacks=[probe])
        run.fit(*fresh())
        run.save_checkpoint(folder / "x.ckpt")
    return probe


def test_a_module_knows_its_trainer() -> None:
    lm, _ = fresh()
    assert internals.trainer_of(lm) is None, MOVED % "trainer_of"
    run = Trainer(logger=False, enable_checkpointing=False)
    lm.trainer = run
    assert internals.trainer_of(lm) is run, MOVED % "trainer_of"


def test_the_steps_of_a_trainer_can_be_changed() -> None:
    run = Trainer(logger=False, enable_checkpointing=False, max_steps=3)
    internals.set_max_steps(run, 5)
    assert run.max_steps == 5, MOVED % "set_max_steps"


def test_a_validation_is_known_to_be_due_in_the_hooks_before_it(probe: Probe) -> None:
    assert probe.seen["due"] == [False, False, True] * 2, MOVED % "is_validation_due"


def test_the_ends_of_batches_and_epochs_are_known(probe: Probe) -> None:
    assert probe.seen["batch end"] == [True] * 6, MOVED % "is_batch_ending"
    assert probe.seen["batch start"] == [False] * 6, MOVED % "is_batch_ending"
    assert probe.seen["epoch end"] == [True], MOVED % "is_epoch_ending"


@pytest.mark.parametrize("validation", ["none", "running", "over"])
def test_counters_are_where_a_checkpoint_has_them(probe: Probe, validation: internals.Validation) -> None:
    fit_loop = probe.checkpoint["loops"]["fit_loop"]
    stepped = fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"]
    counts = {"ready", "started", "processed", "completed"}
    for name in ("epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
        assert all(fit_loop[name][part].keys() == counts for part in ("total", "current")), MOVED % "settle_counters"
    copied = {"loops": {"fit_loop": {name: _copy(value) for name, value in fit_loop.items()}}}
    internals.settle_counters(copied, validation)
    settled = copied["loops"]["fit_loop"]
    assert len(set(settled["epoch_loop.batch_progress"]["total"].values())) == 1
    assert settled["epoch_loop.state_dict"]["_batches_that_stepped"] == stepped - (validation == "over")
    segments = settled["epoch_loop.val_loop.batch_progress"]["total"]
    begun = 1 if validation == "running" else 0
    assert segments["started"] - segments["completed"] == begun


def _copy(value: Any) -> Any:
    return {name: _copy(part) for name, part in value.items()} if isinstance(value, dict) else value
