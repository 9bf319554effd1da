"""Habits of Lightning users: overfit_batches, epochs in place of steps, their own callbacks and checkpoints."""

import csv
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from conftest import write_midi
from dsmr.cli import main
from dsmr.cli.given_settings import COMMAND_LINE, Option, level_given
from dsmr.cli.lightning_cli import QUIET
from dsmr.data.datamodule import MusicData
from dsmr.data.synthetic import RecallTask
from dsmr.data.windows import Windows
from dsmr.generate import Generator
from dsmr.generate.continuations import continuations
from dsmr.generate.piece_files import split_prompts
from dsmr.model import RecurrentTransformer
from dsmr.results.run_files import read_checkpoint
from dsmr.training.callbacks import LostProcess
from dsmr.training.module import RecurrentLM
from dsmr.training.optimizers import WarmupCosine

SMOKE = ["--config", "smoke", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(autouse=True)
def lightnings_own_warnings() -> None:
    """Keep the program's own filters inside a test."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)


def dsmr(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


class Seen(Callback):
    """Records the batches of each of Lightning's epochs."""

    def __init__(self) -> None:
        self.epochs: list[list[tuple[int, ...]]] = []
        self.num_validated = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append([])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.epochs[-1].append((batch.step, *batch.tokens_BT.flatten().tolist()))

    def on_validation_batch_start(self, *_: Any) -> None:
        self.num_validated += 1


def backbone(vocab_size: int, horizons: Any, segment_length: int) -> RecurrentTransformer:
    sizes: dict[str, Any] = {"d_model": 16, "num_layers": 2, "num_heads": 2, "memory_block": 16}
    return RecurrentTransformer(vocab_size, horizons, segment_length, **sizes)


def module(data: MusicData, horizons: str = "1x64+1x32") -> RecurrentLM:
    sizes = {"vocab_size": data.vocab_size, "segment_length": data.segment_length}
    return RecurrentLM(horizons, backbone, lr_scheduler=lambda o: WarmupCosine(o, warmup_steps=2), **sizes)


def trainer(tmp_path: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 0}
    return Trainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, enable_checkpointing=False,
        callbacks=list(callbacks), **{**quiet, **settings},
    )  # fmt: skip


def recall_data(**settings: Any) -> MusicData:
    task = RecallTask(num_train=8, num_validation=2)
    return MusicData(recall=task, segment_length=32, num_lanes=2, transpose=0, **settings)


def csv_rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("limit", "num_batches"), [(3, 3), (0.05, None)])
def test_overfit_batches_repeats_the_same_batches_in_every_epoch(
    tmp_path: Path, limit: int | float, num_batches: int | None
) -> None:
    data, seen = recall_data(), Seen()
    trainer(tmp_path, seen, overfit_batches=limit, max_epochs=3).fit(module(data), data)
    expected = num_batches or int(len(data.train_dataloader()) * 0.05)
    assert expected > 1
    assert [len(epoch) for epoch in seen.epochs] == [expected] * 3
    assert seen.epochs[0] == seen.epochs[1] == seen.epochs[2]
    assert [step for step, *_ in seen.epochs[0]] == list(range(expected))
    assert seen.num_validated > 0


def test_limited_epochs_go_through_the_whole_stream(tmp_path: Path) -> None:
    data, seen = recall_data(), Seen()
    whole = len(data.train_dataloader())
    trainer(tmp_path, seen, limit_train_batches=whole - 3, limit_val_batches=0, max_epochs=3).fit(module(data), data)
    assert [len(epoch) for epoch in seen.epochs] == [whole - 3] * 3
    steps = [step for epoch in seen.epochs for step, *_ in epoch]
    assert steps == [k % whole for k in range(len(steps))]


def test_a_second_trainer_sees_whole_epochs_again(tmp_path: Path) -> None:
    data, seen = recall_data(), Seen()
    trainer(tmp_path, overfit_batches=2, max_epochs=1).fit(module(data), data)
    data.seek(0)
    trainer(tmp_path, seen, max_epochs=1, limit_val_batches=0).fit(module(data), data)
    assert [step for step, *_ in seen.epochs[0]] == list(range(len(data.train_dataloader())))


def test_epochs_of_windows_all_have_as_many_batches(tmp_path: Path) -> None:
    folder = tmp_path / "midi"
    for number in range(12):
        write_midi(folder / f"{number}.mid", number, num_notes=40 + 13 * number)
    data, seen = MusicData(str(folder), windows=Windows(stride=16), segment_length=32, num_lanes=2), Seen()
    num_steps = {data.train_dataloader().dataset.plan(epoch).num_steps for epoch in range(4)}  # type: ignore[attr-defined]
    assert len(num_steps) > 1, "windows begin at random places, so that their number differs by epoch"
    trainer(tmp_path, seen, limit_val_batches=0, max_epochs=4).fit(module(data, "2x0"), data)
    assert {len(epoch) for epoch in seen.epochs} == {len(data.train_dataloader())}
    assert len(seen.epochs) == 4


def test_no_sampler_of_lightnings_replaces_the_stream_on_several_devices() -> None:
    from torch.utils.data import DistributedSampler, SequentialSampler

    for loader in (recall_data().train_dataloader(), recall_data().val_dataloader()):
        assert isinstance(loader.sampler, SequentialSampler)  # or overfit_batches would replace it
        assert isinstance(loader.sampler, DistributedSampler)  # or use_distributed_sampler would


def test_the_cosine_ends_with_the_epochs(tmp_path: Path) -> None:
    data, lm = recall_data(), module(recall_data())
    run = trainer(tmp_path, max_epochs=2, limit_val_batches=0, accumulate_grad_batches=2)
    run.fit(lm, data)
    (scheduler,) = run.lr_scheduler_configs
    steps = 2 * -(-len(data.train_dataloader()) // 2)
    assert run.global_step == steps
    assert scheduler.scheduler.total_steps == steps
    lowest = scheduler.scheduler.final_share * scheduler.scheduler.base_lrs[0]
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(lowest)


def test_a_cosine_without_any_end_is_refused(tmp_path: Path) -> None:
    data = recall_data()
    with pytest.raises(ValueError, match=r"set trainer\.max_steps, trainer\.max_epochs or"):
        trainer(tmp_path, max_epochs=-1).fit(module(data), data)


def test_a_module_is_loaded_from_a_checkpoint_as_lightning_users_do(tmp_path: Path) -> None:
    data = recall_data()
    lm = module(data)
    run = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    run.fit(lm, data)
    run.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    loaded = RecurrentLM.load_from_checkpoint(tmp_path / "x.ckpt")
    found, expected = (trainer(tmp_path).validate(one, data, verbose=False) for one in (loaded, lm))
    assert found == expected
    assert loaded.backbone.horizons == (64, 32)
    assert RecurrentLM.load_from_checkpoint(
        tmp_path / "x.ckpt"
    ).backbone.training  # so that training continues with dropout


def test_continuations_are_returned_to_python() -> None:
    data = recall_data()
    lm = RecurrentLM("1x64+1x32", backbone, vocab_size=data.vocab_size, segment_length=data.segment_length)
    generator = Generator(lm.backbone.eval(), data.tokenizer)
    found = {
        name: continuations(generator, prompt, seconds=0.5)
        for name, prompt in split_prompts(data, "validation", seconds=2)
    }
    assert list(found) == [data.store.pieces[n].name for n in data.pieces("validation")]
    assert all(len(made) == 1 for made in found.values())


def settings_of(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return loaded["trainer"]


def test_epochs_on_the_command_line_lift_the_steps_of_a_config(tmp_path: Path) -> None:
    options = ["--root", tmp_path, "--trainer.limit_train_batches", 12, "--trainer.limit_val_batches", 1]
    assert dsmr("fit", *SMOKE, *options, "--name", "epochs", "--trainer.max_epochs", 3) == 0
    last = read_checkpoint(tmp_path / "epochs" / "last.ckpt")
    assert last["global_step"] == 36  # the smoke config would end after 20 steps
    assert settings_of(tmp_path / "epochs")["max_steps"] == -1
    assert dsmr("fit", *SMOKE, *options, "--name", "both", "--trainer.max_epochs", 3, "--trainer.max_steps", 7) == 0
    assert read_checkpoint(tmp_path / "both" / "last.ckpt")["global_step"] == 7
    assert dsmr("fit", "--resume", tmp_path / "epochs", "--trainer.max_steps", 40) == 0
    assert read_checkpoint(tmp_path / "epochs" / "last.ckpt")["global_step"] == 40


def test_where_a_setting_is_given_last(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("1.yaml", "2.yaml", "3.yaml"))
    one.write_text("trainer: {max_steps: 5, max_epochs: null}\n")
    two.write_text("trainer:\n  max_epochs: 5\ntrainer.min_steps: 3\n")  # jsonargparse takes flat keys too
    three.write_text("min_epochs: 2\n")
    arguments = ["--config", str(one), f"--config={two}", "--trainer.devices", "1", "--trainer", str(three)]
    arguments += ["--trainer", "{num_nodes: 2}"]
    names = ("max_steps", "max_epochs", "min_steps", "min_epochs", "devices", "num_nodes", "max_time")
    options = {f"trainer.{name}": Option(int | None, None, False, False) for name in names}
    levels = {name: level_given(arguments, options, f"trainer.{name}") for name in names}
    top = COMMAND_LINE
    expected = {"max_steps": 0, "max_epochs": 1, "min_steps": 1, "min_epochs": top, "devices": top, "num_nodes": top}
    assert levels == {**expected, "max_time": -1}


def test_minus_one_is_no_limit_and_lifts_none(tmp_path: Path) -> None:
    config = tmp_path / "epochs.yaml"
    config.write_text("trainer: {max_epochs: 1, limit_train_batches: 6, limit_val_batches: 1}\n")
    options = ["--root", tmp_path, "--config", config]
    assert dsmr("fit", *SMOKE, *options, "--name", "steps", "--trainer.max_steps", -1) == 0
    assert read_checkpoint(tmp_path / "steps" / "last.ckpt")["global_step"] == 6
    assert dsmr("fit", *SMOKE, *options, "--name", "epochs", "--trainer.max_steps=3", "--trainer.max_epochs=-1") == 0
    assert read_checkpoint(tmp_path / "epochs" / "last.ckpt")["global_step"] == 3


def test_a_share_of_an_epoch_may_be_the_interval_of_validation(tmp_path: Path) -> None:
    options = ["--root", tmp_path, "--trainer.limit_train_batches", 8, "--trainer.max_epochs", 2]
    assert dsmr("fit", *SMOKE, *options, "--name", "half", "--trainer.val_check_interval", 0.5) == 0
    assert [int(row["step"]) for row in csv_rows(tmp_path / "half") if row["val/perplexity"]] == [3, 7, 11, 15]
    assert dsmr("fit", *SMOKE, *options, "--name", "every", "--trainer.check_val_every_n_epoch", 1) == 0
    assert [int(row["step"]) for row in csv_rows(tmp_path / "every") if row["val/perplexity"]] == [7, 15]
    assert (tmp_path / "every" / "pieces.csv").is_file()
    config = tmp_path / "every.yaml"
    config.write_text("trainer: {check_val_every_n_epoch: 1}\n")
    batches = ["--config", config, "--name", "batches", "--trainer.val_check_interval", 6]
    assert dsmr("fit", *SMOKE, *options, *batches) == 0
    assert [int(row["step"]) for row in csv_rows(tmp_path / "batches") if row["val/perplexity"]] == [5, 11]
    states = read_checkpoint(tmp_path / "every" / "last.ckpt")["callbacks"]
    scores = [state["best_model_score"] for state in states.values() if "best_model_score" in state]
    assert scores == [min(float(r["val/perplexity"]) for r in csv_rows(tmp_path / "every") if r["val/perplexity"])]


def test_the_default_root_dir_is_the_folder_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trainer.max_steps", 2, "--name", "a", "--trainer.default_root_dir", tmp_path / "there"]
    assert dsmr("fit", *SMOKE, *options) == 0
    assert (tmp_path / "there" / "a" / "last.ckpt").is_file()
    assert dsmr("fit", *SMOKE, *options, "--root", tmp_path / "here") == 2
    assert "both name the folder of runs; give one" in capsys.readouterr().err
    assert not (tmp_path / "here").exists()
    config = tmp_path / "there" / "a" / "config.yaml"
    again = ["--config", config, "--name", "b", "--root", tmp_path / "here"]
    assert dsmr("fit", *again) == 0  # the run's config has the other one; what is given last counts
    assert (tmp_path / "here" / "b" / "last.ckpt").is_file()


@pytest.fixture(scope="module")
def with_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of Lightning's own ModelCheckpoint, every few steps and after each validation.

    Rows are logged every 5 steps, and every 10 steps are validated.
    """
    root = tmp_path_factory.mktemp("runs")
    every = []
    for sign, steps in (("", 7), ("+", 5)):
        every += [f"--trainer.callbacks{sign}=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]
        every += [f"--trainer.callbacks.every_n_train_steps={steps}"]
    validated = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/perplexity"]
    validated += ["--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.filename=validated-{step}"]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("DSMR_CACHE", str(root / "cache"))
        assert dsmr("fit", *SMOKE, *every, *validated, "--root", root, "--name", "run") == 0
    return root / "run"


def test_checkpoints_of_lightnings_own_callback_are_validated_and_generated_from(
    with_checkpoints: Path, tmp_path: Path
) -> None:
    path = with_checkpoints / "checkpoints" / "validated-step=10.ckpt"
    output = tmp_path / "result.json"
    assert dsmr("validate", "--checkpoint", path, "--output", output, "--trainer.enable_progress_bar=false") == 0
    found = json.loads(output.read_text())["metrics"]["val/perplexity"]
    assert [found] == [float(r["val/perplexity"]) for r in csv_rows(with_checkpoints) if r["val/perplexity"]][:1]
    assert (with_checkpoints / "pieces_validated-step=10.csv").is_file()
    assert dsmr("generate", "--checkpoint", path, "--seconds", 2, "--output", tmp_path / "x.mid") == 0
    assert dsmr("export", path, tmp_path / "model") == 0
    assert (tmp_path / "model" / "config.yaml").is_file()  # of the run, above the checkpoint's folder


@pytest.mark.parametrize("name", [*(f"epoch=0-step={n}.ckpt" for n in (5, 7, 10, 14, 20)), "validated-step=10.ckpt"])
def test_a_run_resumes_from_checkpoints_of_lightnings_own_callback(
    with_checkpoints: Path, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(with_checkpoints, run)
    warnings.filterwarnings("ignore", message=".*dirpath has changed.*")  # ModelCheckpoint's, of a run that was moved
    assert dsmr("fit", "--resume", run / "checkpoints" / name) == 0
    kept = [
        [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in csv_rows(folder)]
        for folder in (with_checkpoints, run)
    ]
    assert kept[0] == kept[1]
    before, after = (read_checkpoint(folder / "last.ckpt")["state_dict"] for folder in (with_checkpoints, run))
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


def test_their_checkpoints_know_the_best_score_so_far(with_checkpoints: Path) -> None:
    content = read_checkpoint(with_checkpoints / "checkpoints" / "validated-step=10.ckpt")
    scores = {
        float(s["best_model_score"]) for s in content["callbacks"].values() if s.get("best_model_score") is not None
    }
    assert scores == {float(r["val/perplexity"]) for r in csv_rows(with_checkpoints)[:3] if r["val/perplexity"]}


def test_a_run_resumes_from_a_checkpoint_of_an_epochs_end(tmp_path: Path) -> None:
    options = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1", "--root", tmp_path]
    options += ["--trainer.limit_train_batches", 7, "--trainer.max_epochs", 3, "--trainer.val_check_interval", 1.0]
    assert dsmr("fit", *SMOKE, *options, "--name", "run") == 0
    for name in ("epoch=0-step=7", "epoch=1-step=14"):
        again = tmp_path / name
        shutil.copytree(tmp_path / "run", again)
        warnings.filterwarnings("ignore", message=".*dirpath has changed.*")
        assert dsmr("fit", "--resume", again / "checkpoints" / f"{name}.ckpt") == 0
        kept = [
            [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in csv_rows(folder)]
            for folder in (tmp_path / "run", again)
        ]
        assert kept[0] == kept[1]
        before, after = (read_checkpoint(folder / "last.ckpt")["state_dict"] for folder in (tmp_path / "run", again))
        assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_checkpoint_without_its_run_says_what_to_do(
    with_checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "a" / "b" / "c" / "moved.ckpt"
    moved.parent.mkdir(parents=True)
    shutil.copy(with_checkpoints / "checkpoints" / "epoch=0-step=7.ckpt", moved)
    (tmp_path / "a" / "config.yaml").write_text("not: a run's\n")  # no run's folder
    assert dsmr("validate", "--checkpoint", moved) == 2
    assert "give the run's own with --config" in capsys.readouterr().err
    config = with_checkpoints / "config.yaml"
    options = ["--config", config, "--trainer.callbacks", "null", "--trainer.enable_progress_bar=false"]
    assert dsmr("validate", "--checkpoint", moved, *options) == 0
    assert dsmr("fit", "--resume", moved, *options) == 2


def test_a_callback_whose_default_is_an_enum_is_kept_in_the_config(tmp_path: Path) -> None:
    options = ["--root", tmp_path, "--name", "timed", "--trainer.max_steps", 2, "--trainer.callbacks=Timer"]
    assert dsmr("fit", *SMOKE, *options) == 0
    (timer,) = settings_of(tmp_path / "timed")["callbacks"]
    assert timer["init_args"]["interval"] == "step"
    assert dsmr("fit", "--resume", tmp_path / "timed", "--trainer.max_steps", 4) == 0


@pytest.mark.parametrize("name", ["LearningRateFinder", "BatchSizeFinder", "BackboneFinetuning"])
def test_callbacks_that_cannot_work_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert dsmr("fit", *SMOKE, "--root", tmp_path / "runs", f"--trainer.callbacks={name}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dsmr: error: trainer.callbacks: {name} does not work here; ")
    assert not (tmp_path / "runs").exists()


def test_a_class_in_the_current_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class Told(Callback):\n"
        "    def on_train_end(self, trainer, pl_module):\n"
        "        open('told.txt', 'w').write(str(trainer.global_step))\n"
    )
    program = Path(sys.executable).parent / "dsmr"  # whose own folder, not the current one, is on sys.path
    command = [program, "fit", *SMOKE, "--trainer.max_steps", "2", "--trainer.callbacks", "mine.Told"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "told.txt").read_text() == "2"


@pytest.mark.parametrize(
    ("world_size", "error", "is_lost"),
    [
        (2, RuntimeError("[pair.cc:537] Read error [127.0.0.1]:8364: Connection reset by peer. More"), True),
        (1, RuntimeError("Connection reset by peer"), False),
        (2, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (2, ValueError("timeout"), False),
    ],
)
def test_a_lost_process_is_named_as_soon_as_it_is_missed(
    world_size: int, error: Exception, is_lost: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    callback = LostProcess(Path("runs/many"))
    callback.on_exception(SimpleNamespace(world_size=world_size), None, error)  # type: ignore[arg-type]
    assert callback.is_lost == is_lost
    said = capfd.readouterr().err
    assert said == "" or said.splitlines() == [said.rstrip()]
    assert ("does not answer (Read error [127.0.0.1]:8364: Connection reset by peer)" in said) == is_lost
    assert ("dsmr fit --resume runs/many" in said) == is_lost
