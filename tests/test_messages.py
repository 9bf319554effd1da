"""Mistakes as users make them: one line that says what to do, exit status 2, and nothing left behind."""

import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Trainer

from dsmr.cli import main
from dsmr.cli.common_options import check_device
from dsmr.cli.library_errors import is_refusal
from dsmr.cli.lightning_cli import DsmrCLI
from dsmr.cli.run_checks import check_resumed
from dsmr.cli.trainer_settings import check_devices
from test_cli import SMOKE, dsmr, lightnings_own_warnings, rows, smoke_run  # noqa: F401 (fixtures)

FIT = ["fit", *SMOKE, "--name", "n"]
CALLBACK = "--trainer.callbacks"
EARLY = "{class_path: EarlyStopping, init_args: {%s}}"
RATES = "{class_path: LearningRateMonitor, init_args: {logging_interval: step}}"
LOGGERS = "known: CSVLogger, CometLogger"

Case = tuple[list[str], list[str]]

CLASSES: dict[str, Case] = {
    "a wrong key of a callback": (
        [CALLBACK, f"[{EARLY % 'monitr: val/nll'}]"],
        [
            "unknown key trainer.callbacks.monitr; did you mean monitor?",
            "EarlyStopping takes monitor, min_delta, patience",
        ],
    ),
    "a wrong key of an appended callback": (
        [f"{CALLBACK}+=EarlyStopping", f"{CALLBACK}.monitr=val/nll"],
        ["unknown key trainer.callbacks.monitr; did you mean monitor?"],
    ),
    "a callback without what it needs": (
        [CALLBACK, "[{class_path: EarlyStopping}]"],
        ["trainer.callbacks: EarlyStopping needs monitor; give trainer.callbacks.monitor"],
    ),
    "a number of the wrong type": (
        [CALLBACK, f"[{EARLY % 'monitor: val/nll, patience: x'}]"],
        ["trainer.callbacks.patience is 'x'; it takes an integer"],
    ),
    "the second callback of two": (
        [CALLBACK, "[{class_path: ModelSummary}, {class_path: EarlyStoping}]"],
        ["trainer.callbacks: no class EarlyStoping; did you mean EarlyStopping?"],
    ),
    "arguments without a class": (
        [CALLBACK, "[{init_args: {patience: 3}}]"],
        ["trainer.callbacks needs a class_path, the name of its class"],
    ),
    "a key beside class_path": (
        [CALLBACK, "[{class_path: ModelSummary, max_depth: 3}]"],
        ["trainer.callbacks.max_depth is beside class_path; arguments of the class belong under init_args"],
    ),
    "a number for a callback": (
        [CALLBACK, "3"],
        ["trainer.callbacks is 3; it takes a Callback, a list of such or null"],
    ),
    "a callback of another package": (
        [CALLBACK, "json.JSONDecoder"],
        ["trainer.callbacks: json.JSONDecoder is not a Callback"],
    ),
    "a module that is not there": ([CALLBACK, "nope.Foo"], ["trainer.callbacks: no module nope"]),
    "a class that its module has not": (
        [CALLBACK, "dsmr.training.callbacks.Foo"],
        ["module dsmr.training.callbacks has no Foo"],
    ),
    "a value of a Literal": (
        [CALLBACK, "[{class_path: LearningRateMonitor, init_args: {logging_interval: minute}}]"],
        ["trainer.callbacks.logging_interval is 'minute'; it takes 'step', 'epoch' or null"],
    ),
    "what a callback refuses itself": (
        [CALLBACK, "[{class_path: ModelCheckpoint, init_args: {save_top_k: -3}}]"],
        ["trainer.callbacks: ModelCheckpoint: Invalid value for save_top_k=-3. Must be >= -1"],
    ),
    "a duration that is none": (
        [CALLBACK, "[{class_path: Timer, init_args: {duration: nonsense}}]"],
        ["trainer.callbacks: Timer:", "DD:HH:MM:SS"],
    ),
    "an unknown logger": (["--trainer.logger", "Nope"], [f"trainer.logger: no class Nope; {LOGGERS}"]),
    "a logger without what it needs": (["--trainer.logger", "CSVLogger"], ["CSVLogger needs save_dir"]),
    "a key of a logger": (
        ["--trainer.logger", "WandbLogger", "--trainer.logger.nme", "x"],
        ["unknown key trainer.logger.nme; did you mean name?"],
    ),
    "a key of no logger": (["--trainer.logger.name", "x"], ["trainer.logger needs a class_path", LOGGERS]),
    "a folder that a logger cannot make": (
        ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "/proc/nope"],
        ["cannot write /proc/nope"],
    ),
    "a strategy that is none": (
        ["--trainer.strategy", "nope"],
        ["trainer.strategy nope: no such strategy; known: auto, ddp"],
    ),
    "a strategy's near miss": (["--trainer.strategy", "dpp"], ["did you mean ddp?"]),
    "a strategy's class": (
        ["--trainer.strategy", "DDPStrategy"],
        ["names a class; write {class_path: lightning.pytorch.strategies.DDPStrategy}"],
    ),
    "a strategy's key": (
        ["--trainer.strategy", "{class_path: DDPStrategy, init_args: {timeot: 0:02:00}}"],
        ["unknown key trainer.strategy.timeot; did you mean timeout?"],
    ),
    "a strategy's duration": (
        ["--trainer.strategy", "{class_path: DDPStrategy, init_args: {timeout: x}}"],
        ["trainer.strategy.timeout is 'x'; it takes a duration such as 0:02:00 or null"],
    ),
    "a strategy that copies processes": (["--trainer.strategy", "ddp_spawn"], ["use ddp"]),
    "a strategy for GPUs": (["--trainer.strategy", "fsdp"], ["`fsdp` requires a GPU accelerator"]),
    "an optimizer's class": (["--model.optimizer", "Sgd"], ["model.optimizer: no class Sgd; did you mean SGD?"]),
    "an optimizer of two packages": (
        ["--model.optimizer", "Muon"],
        ["Muon is ambiguous; write torch.optim.Muon or dsmr.training.Muon"],
    ),
    "an optimizer's key": (
        ["--model.optimizer", "SGD", "--model.optimizer.momentun", "0.9"],
        ["unknown key model.optimizer.momentun; did you mean momentum? SGD takes lr, momentum"],
    ),
    "an optimizer's pair": (
        ["--model.optimizer", "Adam", "--model.optimizer.betas", "3"],
        ["model.optimizer.betas is 3; it takes a list of 2"],
    ),
    "an optimizer that torch refuses": (["--model.optimizer", "LBFGS"], ["model.optimizer: LBFGS doesn't support"]),
    "a schedule without what it needs": (
        ["--model.lr_scheduler", "StepLR"],
        ["model.lr_scheduler: StepLR needs step_size; give model.lr_scheduler.step_size"],
    ),
    "a schedule whose key comes later": (
        ["--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", "x"],
        ["model.lr_scheduler.step_size is 'x'; it takes an integer"],
    ),
    "a schedule that torch refuses": (
        ["--model.lr_scheduler", "OneCycleLR", "--model.lr_scheduler.max_lr", "1e-3"],
        ["model.lr_scheduler: You must define either total_steps"],
    ),
    "a schedule that is none": (
        ["--model.lr_scheduler", "null"],
        ["model.lr_scheduler is null; it takes an LRScheduler"],
    ),
    "a schedule that waits for a plateau": (
        ["--model.lr_scheduler", "lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor", "val/nll"],
        ["model.lr_scheduler: ReduceLROnPlateau is not supported", "use dsmr.training.WarmupCosine"],
    ),
    "no epochs": (["--trainer.max_epochs", "0"], ["trainer.max_epochs is 0"]),
    "neither steps nor epochs": (
        ["--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"],
        ["nothing ends the run: set trainer.max_steps"],
    ),
    "an interval that no epoch reaches": (
        ["--trainer.val_check_interval", "500", "--trainer.check_val_every_n_epoch", "1"],
        ["`val_check_interval` (500) must be less than or equal"],
    ),
    "a warm-up below nothing": (["--model.lr_scheduler.warmup_steps", "-1"], ["warmup_steps (-1) must be at least 0"]),
    "an unknown network": (
        ["--model.backbone", "Nope"],
        ["no class Nope; known: ", "PerceiverAR, RecurrentTransformer"],
    ),
    "a network that is none": (["--model.backbone", "torch.nn.Linear"], ["torch.nn.Linear is not a Backbone"]),
    "a network's number": (
        ["--model.backbone.num_layers", "x"],
        ["model.backbone.num_layers is 'x'; it takes an integer"],
    ),
    "a network's whole number": (["--model.backbone.num_layers", "1e1"], ["is 1e1; it takes an integer: write 10"]),
    "a network's width": (["--model.backbone.hidden_width", "-1"], ["hidden_width -1"]),
    "a schedule of horizons": (
        ["--model.horizons", "{class_path: TwoScal}"],
        ["no class TwoScal; did you mean TwoScale?"],
    ),
    "a key of horizons": (
        ["--model.horizons", "{class_path: TwoScale, init_args: {lng: 3}}"],
        ["unknown key model.horizons.lng; did you mean long? TwoScale takes long, short, num_long, placement"],
    ),
    "a key of horizons that are a string": (
        ["--model.horizons.long", "3"],
        [
            "model.horizons needs a class_path",
            "known: Ascending, Binary, Descending, Fitted, Full, ",
            "TwoScale, Uniform",
        ],
    ),
    "a schedule within a schedule": (
        ["--model.horizons=Fitted", "--model.horizons.schedule=TwoScal", "--model.horizons.budget=640"],
        ["model.horizons.schedule: no class TwoScal; did you mean TwoScale?"],
    ),
    "horizons below nothing": (
        ["--model.horizons", "Uniform", "--model.horizons.horizon", "-64"],
        ["Uniform.horizons(2) returned (-64, -64)", "none negative"],
    ),
    "horizons that look like a number": (["--model.horizons", "512"], ["for 2 layers write, for example, 2x512"]),
    "a key of generated pieces": (
        ["--data.recall", "{num_trian: 3}"],
        [
            "unknown key data.recall.num_trian; did you mean num_train?",
            "RecallTask takes distances, num_train, num_validation, seed",
        ],
    ),
    "generated pieces that are a string": (["--data.recall", "x"], ["data.recall: no class x; known: RecallTask"]),
    "an item of a list": (
        ["--data.recall.distances", "[64, x]"],
        ["data.recall.distances is 'x'; it takes an integer"],
    ),
    "windows that are a number": (["--data.windows", "3"], ["data.windows is 3; it takes a Windows or null"]),
    "a key of windows": (["--data.windows.strid", "3"], ["unknown key data.windows.strid; did you mean stride?"]),
    "a value for a section": (
        ["--data.tokenizer", "3"],
        ["data.tokenizer is 3; it is a section of settings such as data.tokenizer.name"],
    ),
    "a plugin that is none": (["--trainer.plugins", "nope"], ["trainer.plugins: no class nope"]),
    "a profiler that is none": (["--trainer.profiler", "nope"], ["['simple', 'advanced', 'pytorch', 'xla']"]),
}
HABITS: dict[str, Case] = {
    "a root that cannot be made": (
        ["--root", "/proc/nope"],
        ["--root /proc/nope: the folder /proc/nope/n cannot be made"],
    ),
    "a file in the way of a root": (
        ["--root", __file__],
        [f"--root {__file__}: the folder {__file__}/n cannot be made"],
    ),
    "a seed below 0": (["--seed_everything", "-1"], ["seed_everything is -1; it must be from 0 to 4294967295"]),
    "a seed too large": (
        ["--seed_everything", "4294967296"],
        ["seed_everything is 4294967296; it must be from 0 to 4294967295"],
    ),
    "a word for a seed": (
        ["--seed_everything", "abc"],
        ["--seed_everything is 'abc'; it takes true or false or an integer"],
    ),
    "a seed of data": (["--data.seed", "-1"], ["data.seed is -1; it must be at least 0"]),
    "a seed of generated pieces": (["--data.recall.seed", "-1"], ["data.recall.seed is -1; it must be at least 0"]),
    "all devices of a CPU": (["--trainer.devices", "-1"], ["trainer.devices is '-1'", "1 or more"]),
    "no devices": (["--trainer.devices", "0"], ["trainer.devices is '0'", "number of processes"]),
    "a list of devices": (["--trainer.devices", "[0,1]"], ["trainer.devices is [0, 1]"]),
    "half a device": (["--trainer.devices", "2.5"], ["trainer.devices is '2.5'"]),
    "a TPU": (["--trainer.accelerator", "tpu"], ["trainer.accelerator 'tpu': this machine has cpu"]),
    "an unknown accelerator": (
        ["--trainer.accelerator", "nope"],
        ["trainer.accelerator 'nope': this machine has cpu"],
    ),
    "an unknown precision": (
        ["--trainer.precision", "8"],
        ["trainer.precision is 8; it takes 64, 32, 16, 'transformer-engine'"],
    ),
    "a precision that is a plugin": (
        ["--trainer.precision", "bitsandbytes"],
        ["'bitsandbytes'; it takes 64", "'bf16' or null"],
    ),
    "a barebones trainer": (["--trainer.barebones", "true"], ["trainer.barebones", "dsmr benchmark"]),
    "no checkpoints": (["--trainer.enable_checkpointing", "false"], ["a run keeps its checkpoints"]),
    "no nodes": (["--trainer.num_nodes", "0"], ["trainer.num_nodes is 0; it must be at least 1"]),
    "two nodes of which one is nowhere": (["--trainer.num_nodes", "2"], ["trainer.num_nodes is 2", "MASTER_ADDR"]),
    "a time that is none": (["--trainer.max_time", "nonsense"], ["trainer.max_time is nonsense", "00:02:30:00"]),
    "a time of unknown parts": (
        ["--trainer.max_time", "{minuts: 1}"],
        ["trainer.max_time is {'minuts': 1}", "{hours: 2"],
    ),
    "a time that is over": (["--trainer.max_time", "{minutes: -1}"], ["which is not a duration"]),
    "no steps": (["--trainer.max_steps", "0"], ["trainer.max_steps is 0; set it to at least 1"]),
    "steps in thousands": (
        ["--trainer.max_steps", "1e3"],
        ["trainer.max_steps is 1e3; it takes an integer: write 1000"],
    ),
    "steps below nothing": (["--trainer.max_steps", "-5"], ["`max_steps` must be a non-negative integer or -1"]),
    "a run without an end": (["--trainer.max_steps", "-1"], ["nothing ends the run: set trainer.max_steps"]),
    "a cosine without an end": (
        ["--trainer.max_steps", "-1", "--trainer.max_time", "00:01:00:00"],
        ["the cosine needs an end"],
    ),
    "no batches": (["--trainer.limit_train_batches", "0"], ["trainer.limit_train_batches is 0"]),
    "more than all batches": (["--trainer.limit_train_batches", "1.5"], ["1.5 for limit_train_batches"]),
    "a share without a batch": (
        ["--trainer.limit_train_batches", "0.0001"],
        ["Try at least `limit_train_batches=0.0"],
    ),
    "batches below nothing": (["--trainer.limit_val_batches", "-1"], ["-1 for limit_val_batches"]),
    "a word for batches": (["--trainer.limit_train_batches", "x"], ["is 'x'; it takes a number or null"]),
    "logging below nothing": (
        ["--trainer.log_every_n_steps", "-1"],
        ["trainer.log_every_n_steps is -1; it must be at least 0"],
    ),
    "fewest steps below nothing": (["--trainer.min_steps", "-1"], ["trainer.min_steps is -1; it must be at least 0"]),
    "no epochs between validations": (["--trainer.check_val_every_n_epoch", "0"], ["is 0; it must be at least 1"]),
    "a development run of -1": (["--trainer.fast_dev_run", "-1"], ["fast_dev_run=-1 is not a valid configuration"]),
    "an unknown way of clipping": (["--trainer.gradient_clip_algorithm", "nope"], ["['value', 'norm']"]),
    "determinism of a third kind": (["--trainer.deterministic", "nope"], ["it takes true or false, 'warn' or null"]),
    "a share of refused files": (
        ["--data.max_refused_share", "-1"],
        ["data.max_refused_share is -1.0; it must be from 0 to 1"],
    ),
    "a weight below nothing": (["--model.asked_weight", "-1"], ["model.asked_weight is -1.0; it must be at least 0"]),
    "an averaging that needs epochs": (
        [f"{CALLBACK}+=StochasticWeightAveraging", f"{CALLBACK}.swa_lrs=1e-3"],
        ["SWA with `swa_epoch_start`"],
    ),
    "a network that is frozen whole": (
        [f"{CALLBACK}+=BackboneFinetuning"],
        ["BackboneFinetuning does not work here; it would freeze the whole network"],
    ),
    "an option of old Lightning": (
        ["--trainer.gpus", "1"],
        ["unknown key trainer.gpus; use trainer.accelerator and trainer.devices"],
    ),
    "an option of other programs": (["--lr", "1"], ["unknown key lr; use model.optimizer.lr"]),
    "an option without its section": (["--max_steps", "3"], ["did you mean trainer.max_steps?"]),
    "an option with one dash": (
        ["-trainer.max_steps", "3"],
        ["unknown key -trainer.max_steps; did you mean trainer.max_steps?"],
    ),
    "an option without a value": (["--trainer.max_steps"], ["--trainer.max_steps needs a value"]),
    "a config without a value": (["--config"], ["--config needs a value"]),
    "a flag with a value": (["--json=3"], ["--json takes no value, not 3"]),
    "a key below a number": (
        ["--trainer.max_steps.x", "3"],
        ["trainer.max_steps is an integer, which has no keys of its own"],
    ),
    "a word too many": (["foo"], ["foo"]),
}


def one_line(arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Assert that a command is refused in one line that holds some words."""
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("dsmr: error: ")
    for words in expected:
        assert words in lines[0]
    assert "Union" not in lines[0]
    assert "<class" not in lines[0]


@pytest.mark.parametrize("mistake", [*CLASSES, *HABITS])
def test_a_setting_that_is_refused_is_one_line_and_leaves_nothing_behind(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSMR_CACHE", str(tmp_path.parent / "cache"))
    options, expected = (CLASSES | HABITS)[mistake]
    one_line([*FIT, *options], expected, capsys)
    assert not list(tmp_path.iterdir()), "something was left behind"


PACKAGES: dict[str, Case] = {
    "psutil": ([f"{CALLBACK}+=DeviceStatsMonitor"], ["`psutil` is not installed", "pip install"]),
    "tensorboard": (
        ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=x"],
        ["trainer.logger: TensorBoardLogger: Neither `tensorboard` nor `tensorboardX` is available"],
    ),
    "mlflow": (["--trainer.logger=MLFlowLogger"], ["trainer.logger: MLFlowLogger: Requirement 'mlflow"]),
    "comet_ml": (["--trainer.logger=CometLogger"], ["trainer.logger: CometLogger: Requirement 'comet-ml"]),
    "deepspeed": (["--trainer.strategy=deepspeed"], ["trainer: ", "pip install -U deepspeed"]),
    "transformer_engine": (["--trainer.precision=transformer-engine"], ["Requirement 'transformer_engine"]),
    "torch_xla": (["--trainer.profiler=xla"], ["trainer.profiler xla needs the package torch_xla"]),
}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_is_not_installed_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSMR_CACHE", str(tmp_path.parent / "cache"))
    options, expected = PACKAGES[package]
    one_line([*FIT, *options], expected, capsys)
    assert not list(tmp_path.iterdir())


def test_a_class_whose_own_import_fails_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine_without.py").write_text("import a_package_of_nobody\n\nclass Mine: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    one_line([*FIT, "--trainer.callbacks=mine_without.Mine"], ["mine_without needs a_package_of_nobody"], capsys)


METRICS = {
    "early stopping": f"[{EARLY % 'monitor: val/perplexiti'}]",
    "a checkpoint": "[{class_path: ModelCheckpoint, init_args: {monitor: val/perplexiti}}]",
}


STEPS: dict[str, Case] = {
    "an optimizer of sparse gradients": (["--model.optimizer=SparseAdam"], ["model.optimizer: SparseAdam does not"]),
    "a schedule of no steps": (
        ["--model.lr_scheduler=StepLR", "--model.lr_scheduler.step_size=0"],
        ["model.lr_scheduler: integer modulo by zero"],
    ),
}


@pytest.mark.parametrize("who", STEPS)
def test_what_torch_refuses_at_its_first_step_names_the_setting(
    who: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, expected = STEPS[who]
    one_line([*FIT, "--root", str(tmp_path), *options], expected, capsys)


@pytest.mark.parametrize("who", METRICS)
def test_a_metric_that_is_not_logged_has_its_nearest_named(
    who: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--root", str(tmp_path)]
    expected = "watches val/perplexiti, which is not logged; did you mean val/perplexity?"
    one_line([*FIT, *short, "--trainer.callbacks", METRICS[who]], [expected], capsys)


@pytest.mark.parametrize(
    ("key", "options", "now"),
    [
        ("optimizer", ["--model.optimizer=dsmr.training.Muon"], "dsmr.training.Muon"),
        ("optimizer", ["--model.optimizer=SGD"], "torch.optim.SGD"),
        ("lr_scheduler", ["--model.lr_scheduler=StepLR", "--model.lr_scheduler.step_size=3"], "StepLR"),
    ],
)
def test_resuming_with_another_optimizer_or_schedule_says_what_differs(
    smoke_run: Path,  # noqa: F811
    key: str,
    options: list[str],
    now: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "smoke"
    shutil.copytree(smoke_run, run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    was = "dsmr.training.AdamW" if key == "optimizer" else "dsmr.training.WarmupCosine"
    expected = [f"model.{key} is now", now, f"the run was trained with {was}", f"leave model.{key} as it was"]
    one_line(["fit", "--resume", str(run), *options, "--trainer.max_steps=30"], expected, capsys)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_the_same_optimizer_by_another_spelling_resumes(smoke_run: Path, tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "smoke"
    shutil.copytree(smoke_run, run)
    options = [
        "--model.optimizer=dsmr.training.AdamW",
        "--trainer.max_steps=22",
        "--trainer.enable_progress_bar=false",
    ]
    assert dsmr("fit", "--resume", run, *options) == 0
    config = tmp_path / "old.yaml"
    config.write_text("trainer: {}\n")  # of a run that did not write its model
    check_resumed(config, DsmrCLIWithout("fit", ["--config", "smoke"]).config.model)


class DsmrCLIWithout(DsmrCLI):
    """Settings alone, of which nothing is made."""

    def instantiate_classes(self) -> None:
        """Make nothing."""


FILES: dict[str, tuple[bytes, str | None]] = {
    "nothing": (b"", None),
    "comments": (b"# nothing yet\n\n# max_steps: 3\n", None),
    "a document without content": (b"---\n", None),
    "null": (b"null\n", None),
    "an empty mapping": (b"{}\n", None),
    "an empty section": (b"trainer:\n", None),
    "empty sections with comments": (b"trainer:\n  # max_steps: 3\ndata:\n  tokenizer:\n", None),
    "a byte order mark alone": (b"\xef\xbb\xbf", None),
    "a list": (b"- a\n- b\n", "holds a list, not settings"),
    "a number": (b"3\n", "holds the single value 3, not settings"),
    "a word": (b"hello\n", "holds the single value hello, not settings"),
    "bytes": (bytes(range(256)), "is not text in UTF-8"),
    "UTF-16": ("trainer: {}\n".encode("utf-16"), "is not text in UTF-8"),
    "Latin-1": ("name: café\n".encode("latin-1"), "is not text in UTF-8"),
    "a control character": (b"name: a\0b\n", "is not YAML"),
    "a tab": (b"trainer:\n\tmax_steps: 2\n", "line 2: found character '\\t'"),
    "two documents": (b"name: a\n---\nname: b\n", "line 2"),
    "a list as a key": (b"? [1, 2]\n: 3\n", "is not YAML"),
    "a number as a key": (b"1: 2\n", "unknown key 1 ("),
    "a value for a section": (
        b"data: {}\ntrainer: 3\n",
        "line 2) is 3; it is a section of settings such as trainer.accelerator",
    ),
    "null for a network": (b"model:\n  backbone:\n", "line 2) is null; it takes a Backbone"),
    "null for a number": (b"data: {num_lanes: null}\n", "data.num_lanes ("),
    "null within a network": (
        b"model: {backbone: {class_path: RecurrentTransformer, init_args: {num_layers: null}}}\n",
        "line 1) is null; it takes an integer",
    ),
    "a wrong number within a list": (
        b"trainer:\n  callbacks:\n  - class_path: EarlyStopping\n    init_args:\n      patience: x\n"
        b"      monitor: val/nll\n",
        "trainer.callbacks.patience (a.yaml, line 5) is 'x'; it takes an integer",
    ),
}


@pytest.mark.parametrize("content", FILES)
def test_a_config_file_counts_as_no_settings_or_is_named(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data, expected = FILES[content]
    Path("a.yaml").write_bytes(data)
    options = ["fit", "--config=smoke", "--name=n", "--config", "a.yaml"]
    if expected is not None:
        one_line(options, ["a.yaml", expected], capsys)
        return
    given, without = (DsmrCLIWithout("fit", options[1:end]).config.as_dict() for end in (5, 3))
    assert len(given.pop("config")) == 2
    assert len(without.pop("config")) == 1
    assert given == without


@pytest.mark.parametrize("content", ["\ufefftrainer: {max_steps: 2}\n", "trainer: {max_steps: 2}\r\nname: n\r\n"])
def test_a_byte_order_mark_and_the_line_ends_of_windows_are_read(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content.encode())
    assert DsmrCLIWithout("fit", ["--config=smoke", "--name=n", f"--config={path}"]).config.trainer.max_steps == 2


def test_a_config_that_is_a_folder_or_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("smoke").mkdir()  # does not hide the shipped config of that name
    assert DsmrCLIWithout("fit", ["--config=smoke", "--name=n"]).config.data.num_lanes == 4
    Path("folder.yaml").mkdir()
    one_line(["fit", "--config=folder.yaml"], ["--config folder.yaml is not a file"], capsys)
    one_line(["fit", "--config", ""], ["--config '' is not a file"], capsys)
    Path("mine.yaml").write_text("name: n\n")
    read = Path.read_text

    def denied(path: Path, *args: object, **kwargs: object) -> str:
        if path.name == "mine.yaml":
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", denied)
    one_line(["fit", "--config=mine.yaml"], ["mine.yaml cannot be read (Permission denied)"], capsys)


def test_empty_config_files_are_none_for_other_commands_too(
    smoke_run: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    (tmp_path / "list.yaml").write_text("- 3\n")
    options = ["--checkpoint", smoke_run, "--output", tmp_path / "a.mid", "--seconds", 1]
    assert dsmr("generate", "--config", tmp_path / "empty.yaml", *options) == 0
    capsys.readouterr()
    assert dsmr("generate", "--config", tmp_path / "list.yaml", *options) == 2
    assert "list.yaml holds a list, not settings" in capsys.readouterr().err


DEVICES: dict[str, str] = {
    "meta": "--device meta: this machine has cpu",
    "nope": "--device nope: this machine has cpu",
    "cpu:3": "--device cpu:3: this machine has cpu",
    "0": "--device 0: this machine has cpu",
    "": "--device : this machine has cpu",
    "hpu": "--device hpu: this machine has cpu",
}


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_is_not_there_has_those_named_that_are(
    device: str,
    smoke_run: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--checkpoint", str(smoke_run), f"--device={device}"]
    one_line(["generate", *given, "--output=a.mid"], [DEVICES[device]], capsys)
    if device:
        one_line(["analyze", *given, "--folder=found"], [DEVICES[device]], capsys)
    assert not list(tmp_path.iterdir())


def test_devices_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_device("cpu") == torch.device("cpu")
    monkeypatch.setattr("dsmr.cli.common_options.devices_here", lambda: {"cpu": 1, "cuda": 2})
    for name in ("cuda:7", "cuda:2", "cuda:x", "mps"):
        with pytest.raises(ValueError, match=f"^--device {name}: this machine has cpu, cuda, cuda:1$"):
            check_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_names_the_processor() -> None:
    with pytest.raises(ValueError, match=r"^--device cuda: this machine has cpu(, mps)?$"):
        check_device("cuda")


@pytest.mark.parametrize("devices", ["auto", 1, "2", 16])
def test_numbers_of_processes_are_let_through(devices: object) -> None:
    check_devices(devices, "cpu")


def test_a_seed_of_draws_that_torch_does_not_take_is_refused_before_anything_is_drawn(
    smoke_run: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    big = str(2**63)
    given = ["--checkpoint", str(smoke_run), "--output", str(tmp_path / "a.mid")]
    one_line(["generate", *given, "--seed", big], [f"--seed is {big}; it must be from 0 to {2**63 - 2}"], capsys)
    assert not (tmp_path / "a.mid").exists()


def test_evaluating_nothing_is_refused(smoke_run: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    options = ["--checkpoint", str(smoke_run), "--trainer.limit_val_batches=0"]
    one_line(["validate", *options], ["trainer.limit_val_batches is 0"], capsys)


WORKING: dict[str, list[str]] = {
    "a single callback": ["--trainer.callbacks", "ModelSummary"],
    "a callback for the progress bar": [
        "--trainer.callbacks",
        "RichProgressBar",
        "--trainer.enable_progress_bar=true",
    ],
    "a rate's monitor": ["--trainer.callbacks+=LearningRateMonitor"],
    "early stopping": ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/perplexity"],
    "a development run": ["--trainer.fast_dev_run", "true"],
    "anomalies": ["--trainer.detect_anomaly", "true"],
    "determinism": ["--trainer.deterministic", "true"],
    "no inference mode": ["--trainer.inference_mode", "false"],
    "a profiler": ["--trainer.profiler", "SimpleProfiler"],
    "half of the batches": ["--trainer.limit_train_batches", "0.5"],
    "no logger": ["--trainer.logger", "false"],
    "a class for a strategy": ["--trainer.strategy", "{class_path: SingleDeviceStrategy, init_args: {device: cpu}}"],
    "a plain optimizer": ["--model.optimizer", "SGD", "--model.optimizer.lr", "0.1"],
    "a plain schedule": ["--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", "3"],
}


@pytest.mark.parametrize("habit", WORKING)
def test_a_habit_of_lightnings_users_works(
    habit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1", *WORKING[habit]]
        assert main([*FIT, *options]) == 0
    assert "dsmr: error" not in capsys.readouterr().err


def test_errors_of_our_own_stay_tracebacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def broken(*args: object) -> None:
        raise KeyError("ours")

    with monkeypatch.context() as patch:
        patch.setattr("dsmr.data.datamodule.build_tokenizer", broken)  # while settings are made into objects
        with pytest.raises(KeyError, match="ours"):
            main([*FIT])
    with monkeypatch.context() as patch:
        patch.setattr("dsmr.training.step.token_nll", broken)  # while it trains
        with pytest.raises(KeyError, match="ours"):
            main([*FIT])
    with monkeypatch.context() as patch:
        patch.setitem(main.__globals__["COMMANDS"], "fit", ("dsmr.cli.nothing_of_ours", ""))
        with pytest.raises(ModuleNotFoundError, match="nothing_of_ours"):
            main([*FIT])


def test_a_runtime_error_of_torch_that_no_setting_explains_stays_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsmr.training.step.token_nll", lambda *given: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main([*FIT])


def test_a_full_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")

    monkeypatch.setattr("dsmr.cli.estimate_command.run", full)
    one_line(["estimate"], ["CUDA out of memory: lower data.num_lanes or the horizons"], capsys)


def test_what_a_library_raises_is_told_from_what_our_code_raises() -> None:
    def caught(make: object) -> Exception:
        try:
            make()  # type: ignore[operator]
        except Exception as error:
            return error
        raise AssertionError("nothing was raised")

    assert is_refusal(caught(lambda: torch.nn.Linear(-1, 2)))
    assert not is_refusal(caught(lambda: Trainer(nonsense=1)))  # type: ignore[call-arg]
    assert not is_refusal(caught(lambda: {}["x"]))
    assert not is_refusal(caught(lambda: int("x")))
    assert is_refusal(caught(lambda: int("x")), cls=torch.nn.Linear)
    assert not is_refusal(caught(lambda: int("x")), cls=DsmrCLI)


def test_the_settings_of_a_run_are_written_with_what_wrote_them(smoke_run: Path) -> None:  # noqa: F811
    text = (smoke_run / "config.yaml").read_text()
    assert text.startswith("# lightning.pytorch==")
    assert yaml.safe_load(text)["trainer"]["max_steps"] == 20
