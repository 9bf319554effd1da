"""`dsmr fit`, `validate`, `test`, `predict`: LightningCLI with run folders, shipped configs and one-line mistakes."""

import json
import logging
import os
import re
import shlex
import signal
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger

from dsmr import UserError
from dsmr.analyze.ablation import ablations, savings, variants
from dsmr.cli.by_piece import is_as_in_training, tell_pieces, tell_savings
from dsmr.cli.checks import check_folder, check_nodes, check_resumed, check_seed, check_trainer, cleared
from dsmr.cli.configs import FOLDER, config_values, resolve_configs, take_flag, take_option
from dsmr.cli.given import Settings, options_of
from dsmr.cli.json_output import check_output, write_result
from dsmr.cli.outcome import announce, conclude
from dsmr.cli.parser import OneLineParser
from dsmr.cli.progress import bar
from dsmr.cli.refused import in_training, one_line
from dsmr.cli.trainer_settings import (
    check_callbacks,
    check_end,
    lift_no_validation,
    plain_strings,
    settle_length,
    settle_root,
    settle_validation,
)
from dsmr.data.datamodule import MusicData
from dsmr.data.files import atomic_write
from dsmr.generate.continuer import Continuer
from dsmr.generate.midi_writer import MidiWriter
from dsmr.generate.samples import Samples
from dsmr.model import Schedule
from dsmr.model.backbone import build_on_meta
from dsmr.model.horizons import format_horizons
from dsmr.results.run_files import (
    BEST_FILE,
    CONFIG_FILE,
    LAST_FILE,
    METRICS_FILE,
    SECTION,
    SECTION_FILE,
    find_run_folder,
    read_checkpoint,
)
from dsmr.share import exported
from dsmr.share.description import check_rebuilds, check_same_network, describe_network, import_class
from dsmr.share.loading import find_checkpoint
from dsmr.training.callbacks import (
    BestCheckpoint,
    EpochTime,
    LastCheckpoint,
    LostProcess,
    PeakMemory,
    Stopped,
    Throughput,
)
from dsmr.training.callbacks.last_checkpoint import METRICS_ROWS
from dsmr.training.checkpoint import AtomicCheckpointIO, is_resumable
from dsmr.training.csv_logger import MetricsLogger, count_rows_before, read_metrics
from dsmr.training.module import RecurrentLM

CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
NAME_VARIABLE = "DSMR_RUN_NAME"
RUN_OPTIONS = ("--resume", "--checkpoint", "--ckpt_path")
EVALUATIONS = ("validate", "test")
OWN_OPTIONS = ("checkpoint", "ckpt_path", "resume", "json", "output", "config")
QUIET = (
    ".*instantiate_classes.*",  # Lightning calls what jsonargparse deprecates
    ".*LeafSpec.*",  # Lightning builds what torch deprecates
    ".*LightningCLI's args parameter.*",  # the command is taken off before Lightning sees the rest
    ".*does not have many workers.*",  # reading a batch takes microseconds
    ".*exists and is not empty.*",  # a run that goes on
    ".*infer the batch indices.*",  # a batch of predict is one piece
    ".*your dataloader is not resumable.*",  # the datamodule is
    ".*callbacks used to create the checkpoint.*",  # those of training, where last.ckpt is only evaluated
    ".*`max_epochs` was not set.*",  # our own words say what ends a run
    ".*sync_dist=True.*",  # all processes log the same
)


class SaveConfig(Callback):
    """Keeps the whole config in the run's folder, and what it expanded to, once training has really begun.

    Args:
        parser: which wrote the config.
        config: all settings.
        folder: the run.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, folder: Path) -> None:
        self.parser, self.config, self.folder = parser, config.clone(), folder
        for option in OWN_OPTIONS:
            self.config.pop(option, None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `config.yaml` and `run.json`; log the settings and the expanded horizons to Weights & Biases."""
        if trainer.is_global_zero:
            horizons: tuple[int, ...] = pl_module.backbone.horizons  # type: ignore[union-attr,assignment]
            memory = {"horizons": format_horizons(horizons) if horizons else None, "budget": sum(horizons)}
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_hyperparams({**yaml.safe_load(self.parser.dump(self.config)), "memory": memory})
            self.folder.mkdir(parents=True, exist_ok=True)
            section: dict[str, Any] = pl_module.section  # type: ignore[assignment]
            texts = {
                SECTION_FILE: json.dumps(section, indent=2) + "\n",
                CONFIG_FILE: self.parser.dump(self.config, skip_unset=False),
            }
            for name, text in texts.items():
                try:
                    with atomic_write(self.folder / name) as file:
                        file.write(text.encode())
                except OSError as error:
                    raise UserError(
                        f"cannot write {self.folder / name} ({error.strerror or error}); make room"
                    ) from error


class DsmrCLI(LightningCLI):
    """LightningCLI over `RecurrentLM` and `MusicData`; the command runs what `Trainer` it has built.

    Args:
        command: fit, validate, test, or another command that needs the same configuration.
        arguments: what follows the command.
    """

    def __init__(self, command: str, arguments: list[str]) -> None:
        quieten()
        self.command = command
        self.checkpoint: Path | None = None
        self.exported: Path | None = None
        self.run_folder: Path | None = None  # of the checkpoint
        self.num_metrics_rows = self.begun_at = 0
        self._kept_horizons: list[int] | None = None
        self.as_json, arguments = take_flag(arguments, "--json")
        arguments = self._take_run(arguments)
        arguments = resolve_configs(arguments)
        self._arguments = arguments
        super().__init__(
            Continuer if command == "predict" else RecurrentLM,
            MusicData,
            args=arguments,
            run=False,
            parser_class=OneLineParser,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            parser_kwargs={
                "prog": f"dsmr {command}",
                "default_config_files": [str(FOLDER / "base.yaml")],
                "description": f"dsmr {command}; the README has examples.",
            },
        )

    def _take_run(self, arguments: list[str]) -> list[str]:
        """Resolve --resume and --checkpoint to a file, with the run's own config before all others."""
        named = {}
        for option in RUN_OPTIONS:
            named[option], arguments = take_option(arguments, option)
        if sum(value is not None for value in named.values()) > 1:
            raise UserError(f"give only one of {', '.join(RUN_OPTIONS)}")
        run, given = named["--resume"], named["--checkpoint"] or named["--ckpt_path"]
        if run is not None:
            if self.command != "fit":
                raise UserError(f"--resume belongs to dsmr fit; dsmr {self.command} takes --checkpoint")
            self.checkpoint = find_checkpoint(run, LAST_FILE)
        elif given is not None:
            self.checkpoint = find_checkpoint(given)
        if self.checkpoint is None:
            return arguments
        if self.checkpoint.is_dir():
            self.exported, self.checkpoint = self.checkpoint, self.checkpoint / exported.WEIGHTS
            exported.read_description(self.exported)
        content = {} if self.exported else read_checkpoint(self.checkpoint)
        self._kept_horizons = content.get(SECTION, {}).get("config", {}).get("horizons")
        if self.command == "fit":
            if self.exported:
                raise UserError(
                    f"{self.exported} is an exported model, which cannot resume; use dsmr fit --resume RUN"
                )
            if not is_resumable(content):
                raise UserError(f"{self.checkpoint} holds weights only and cannot resume; use dsmr fit --resume RUN")
        self.run_folder = find_run_folder(self.checkpoint)
        if self.run_folder is None:
            self.run_folder = self.checkpoint.parent
            if self.command == "fit" or not config_values(arguments):
                raise UserError(
                    f"{self.checkpoint} has no {CONFIG_FILE} in its folder or the two above; "
                    "keep it in its run's folder"
                    + ("" if self.command == "fit" else f", or give the run's own with --config {CONFIG_FILE}")
                )
            return arguments
        if self.command == "fit":
            self.num_metrics_rows = known_rows(content, self.run_folder / METRICS_FILE)
            self.begun_at = int(content.get("global_step", 0))
        return ["--config", str(self.run_folder / CONFIG_FILE), *arguments]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:  # noqa: D102
        parser.add_argument("--name", type=str | None, default=None, help="Name of the run; None: horizons and time.")
        parser.add_argument("--root", type=str, default="runs", help="Folder of runs.")
        parser.add_argument("--save_every_n_steps", type=int, default=500, help="Optimizer steps between last.ckpt.")
        parser.add_argument(
            "--save_every_minutes", type=float, default=10.0, help="Minutes between last.ckpt at most."
        )
        parser.add_argument(
            "--sample_every_n_steps", type=int, default=5000, help="Optimizer steps between samples; 0: none."
        )
        parser.add_argument("--resume", type=str | None, default=None, help="fit: the run to go on with.")
        parser.add_argument("--checkpoint", type=str | None, default=None, help="Run (its best) or checkpoint file.")
        if self.command == "predict":
            parser.add_argument(
                "--predictions", type=str | None, default=None, help="Folder for the pieces; None: RUN/predictions."
            )
        if self.command in EVALUATIONS:
            parser.add_argument(
                "--ablate", action="store_true", help="Evaluate also without the memory of each layer, and of all."
            )
            parser.add_argument(
                "--pieces", type=str | None, default=None, help="File for results by piece; None: beside the weights."
            )
        parser.add_argument("--json", action="store_true", help="Results as JSON on the last line of stdout.")
        parser.add_argument("--output", type=str | None, default=None, help="File for the results as JSON.")
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
        parser.link_arguments("data.segment_length", "model.segment_length")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and refuse a seed before it is used."""
        super().parse_arguments(parser, args)
        check_seed(self.config.seed_everything)

    def before_instantiate_classes(self) -> None:
        """Settle the run's folder: a new one for a fresh run, its own for a run that goes on."""
        settings = self.config
        if settings.resume is not None or settings.checkpoint is not None:
            raise UserError("resume and checkpoint belong on the command line, not in a config file; take them out")
        check_settings(settings)
        if isinstance(settings.trainer.callbacks, Namespace):  # a single one
            settings.trainer.callbacks = [settings.trainer.callbacks]
        plain_strings(settings.trainer)
        check_callbacks(settings.trainer.callbacks)
        given = Settings(self._arguments, options_of(self.parser))
        settle_length(settings.trainer, given)
        if self.command == "fit":
            check_end(settings.trainer)
        settle_validation(settings.trainer, given)
        if self.command == "validate":
            lift_no_validation(settings.trainer, given)
        if settings.data.seed is None and isinstance(settings.seed_everything, int):
            settings.data.seed = settings.seed_everything
        if self.run_folder is not None:
            self.folder = self.run_folder
            self._keep_horizons(settings.model)
            if self.command == "fit":
                check_resumed(self.folder / CONFIG_FILE, settings.model)
            return
        settle_root(settings, given)
        if settings.name is None:
            settings.name = new_name(settings.model)
        self.folder = Path(settings.root) / settings.name
        has_saved = any((self.folder / name).exists() for name in (LAST_FILE, BEST_FILE))
        if self.command == "fit" and has_saved and not settings.trainer.fast_dev_run:
            raise UserError(
                f"{self.folder} holds a run already; choose another --name, or go on with --resume {self.folder}"
            )
        if self.command == "fit" and not settings.trainer.fast_dev_run:
            check_folder(self.folder, f"--root {settings.root}")
        continue_wandb(settings.trainer.logger, settings.name)

    def instantiate_classes(self) -> None:
        """Make datamodule, model and trainer of their settings."""
        check_trainer(self.config.trainer, self.command)
        with one_line(self.config):
            super().instantiate_classes()
        check_nodes(self.trainer)

    def _keep_horizons(self, model: Namespace) -> None:
        """Take the run's own schedule as the run expanded it: the class may give other horizons by now."""
        if self._kept_horizons and isinstance(model.horizons, Namespace):
            run = yaml.safe_load((self.folder / CONFIG_FILE).read_text(encoding="utf-8"))
            if json.loads(json.dumps(model.horizons.as_dict())) == run["model"]["horizons"]:
                model.horizons = format_horizons(self._kept_horizons)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Trainer with the run's logger and checkpoints."""
        settings = self.config_init.trainer
        callbacks: list[Callback] = []
        if self.command != "fit" and settings.callbacks:  # nothing is saved
            settings.callbacks = [one for one in settings.callbacks if not isinstance(one, Checkpoint)]
        has_bar = any(isinstance(callback, ProgressBar) for callback in settings.callbacks or [])
        if settings.enable_progress_bar is not False and not has_bar:
            callbacks.append(TQDMProgressBar(refresh_rate=10))
        is_run = self.command == "fit" and not settings.fast_dev_run
        if self.command == "predict":
            self.writer = MidiWriter(Path(self.config.predictions or self.folder / "predictions"))
            callbacks.append(self.writer)
        if is_run:
            for one in settings.callbacks or []:
                if isinstance(one, ModelCheckpoint) and one.dirpath is None:  # whichever logger there is
                    one.dirpath = str(self.folder / "checkpoints")
            # before those of the user's, which save its score; ours comes after all others
            settings.callbacks = [BestCheckpoint(self.folder), *(settings.callbacks or [])]
            callbacks += self._run_callbacks()
        if settings.logger is None:
            kwargs["logger"] = MetricsLogger(self.folder, self.num_metrics_rows) if is_run else False
        self.trainer_defaults["callbacks"] = callbacks
        plugins = settings.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def _run_callbacks(self) -> list[Callback]:
        """What keeps a run in its folder, and measures it."""
        clock = Throughput()
        return [
            SaveConfig(self.parser, self.config, self.folder),
            LostProcess(self.folder),
            EpochTime(),
            clock,
            PeakMemory(),
            Samples(self.folder, self.config.sample_every_n_steps, clock=clock),
            LastCheckpoint(self.folder, self.config.save_every_n_steps, self.config.save_every_minutes),
        ]


class SizesCLI(DsmrCLI):
    """The same configuration as training, of which the network is built without its weights, and no trainer."""

    def instantiate_classes(self) -> None:
        """Build datamodule and network, on no device."""
        with one_line(self.config):
            self.config_init = build_on_meta(lambda: self.parser.instantiate_classes(self.config))
        self.datamodule, self.model = self.config_init.data, self.config_init.model


def check_settings(settings: Namespace) -> None:
    """Refuse what Lightning would stumble over later, and a name that leads elsewhere.

    Raises:
        UserError: naming the key.
    """
    if settings.name is not None:
        check_name("--name", settings.name)
    check_schedule(settings.model.horizons)


def check_schedule(horizons: Any) -> None:
    """Refuse a schedule's class path that was taken for text, since no schedule can be imported from there.

    Raises:
        UserError: with the reason.
    """
    if isinstance(horizons, str) and CLASS_PATH.fullmatch(horizons):
        found = import_class(horizons, f"model.horizons {horizons}:")
        if not (isinstance(found, type) and issubclass(found, Schedule)):
            raise UserError(
                f"model.horizons {horizons} is not a schedule: it does not derive from dsmr.model.Schedule"
            )


def check_name(option: str, name: str) -> None:
    """Refuse a name that is not that of one folder.

    Raises:
        UserError: naming the option.
    """
    if name in ("", ".", "..") or "/" in name or os.sep in name or name != name.strip():
        raise UserError(f"{option} {name!r} must be the name of one folder; --root says where it is")


def label(model: Namespace) -> str:
    """Name for a run: its horizons, with their rule where it is not the default, or else its network."""
    network = model.backbone.class_path.rpartition(".")[2]
    if model.horizons is None:
        return network
    horizons = model.horizons if isinstance(model.horizons, str) else model.horizons.class_path.rpartition(".")[2]
    rule = model.backbone.get("init_args", {}).get("rule", "boundary")
    return horizons if rule == "boundary" else f"{horizons}-{rule}"


def known_rows(checkpoint: dict[str, Any], metrics: Path) -> int:
    """Return how many rows of `metrics.csv` stay when a run is resumed; format 1 tells by the step alone."""
    states = checkpoint.get("callbacks", {}).values()
    known = next((int(state[METRICS_ROWS]) for state in states if METRICS_ROWS in state), None)
    if known is None:
        return count_rows_before(metrics, int(checkpoint["global_step"]))
    return min(known, len(read_metrics(metrics)[0]))  # the last one may have been lost with the process


def new_name(model: Namespace) -> str:
    """Name of a run by its horizons and the time; processes that were started by another take over its name."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0 or NAME_VARIABLE not in os.environ:
        os.environ[NAME_VARIABLE] = f"{label(model)}-{datetime.now():%Y%m%d-%H%M%S}"
    return os.environ[NAME_VARIABLE]


def continue_wandb(loggers: Any, name: str) -> None:
    """Give a run of Weights & Biases an identity that the run's config keeps, so that it goes on as the same."""
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, Namespace) and logger.class_path.endswith("WandbLogger") and not logger.init_args.id:
            known = {"id": uuid4().hex[:12], "name": logger.init_args.name or name, "resume": "allow"}
            logger.init_args.update(Namespace(**known))


def say_stopped(stopped: Stopped, trainer: Trainer, folder: Path) -> int:
    """Tell how to go on; gives the exit status, of the first process alone, since Lightning kills for another's."""
    if not trainer.is_global_zero:
        return 0
    print(f"stopped after step {trainer.global_step:,} ({stopped.reason}), which {folder / LAST_FILE} holds")
    print(f"next: dsmr fit --resume {shlex.quote(str(folder))}")
    return stopped.status


def run(command: str, arguments: list[str]) -> int:
    """Run `fit`, `validate`, `test` or `predict`."""
    cli = DsmrCLI(command, arguments)
    cli.datamodule.progress = bar("tokenising")
    if command != "fit" and cli.checkpoint is None:
        raise UserError(f"dsmr {command} needs a trained model: give --checkpoint RUN")
    output = check_output(cli.config.output)
    cli.model.check_data(cli.datamodule)
    if command == "fit":
        check_rebuilds(cli.model.backbone)
        cli.datamodule.check_training(with_validation=cli.trainer.limit_val_batches != 0)
    announce(cli.model, cli.datamodule, cli.trainer)
    path = None if cli.checkpoint is None or cli.exported else str(cli.checkpoint)
    if cli.exported:
        check_same_network(
            exported.read_description(cli.exported)["model"],
            describe_network(cli.model.backbone, None),
            horizons_too=False,
        )
        cli.model.backbone.load_state_dict(exported.read_weights(cli.exported))
    if command == "fit":
        try:
            with cleared(cli.folder), in_training(cli.trainer):
                cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=path, weights_only=True)
        except Stopped as stopped:
            return say_stopped(stopped, cli.trainer, cli.folder)
        except RuntimeError:
            callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
            if not any(isinstance(one, LostProcess) and one.is_lost for one in callbacks):
                raise
            if cli.trainer.strategy.launcher is not None:  # what hangs hears no other signal
                cli.trainer.strategy.launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))
            return 2
    elif command == "predict":
        return predict(cli, path, output)
    else:
        return evaluate(cli, path, output)
    if cli.trainer.is_global_zero:
        if cli.begun_at and cli.trainer.global_step == cli.begun_at:
            print(f"nothing was left to train: {cli.begun_at:,} steps are done; a greater trainer.max_steps goes on")
        result = conclude(command, cli.trainer, cli.model, cli.datamodule, cli.folder)
        write_result(result, as_json=cli.as_json, output=output)
    return 0


def evaluate(cli: DsmrCLI, path: str | None, output: Path | None) -> int:
    """Run `validate` or `test`: figures, results by piece, and where asked, what memory is worth by layer."""
    pieces_file = file_of_pieces(cli)
    if cli.config.ablate:
        variants(cli.model.backbone.horizons)  # refuses what has no memory, before anything is evaluated
    run_once = cli.trainer.validate if cli.command == "validate" else cli.trainer.test
    run_once(cli.model, cli.datamodule, ckpt_path=path, weights_only=True, verbose=False)
    whole, is_first = cli.model.piece_table, cli.trainer.is_global_zero
    result: dict[str, Any] = {}
    if is_first:
        result |= conclude(cli.command, cli.trainer, cli.model, cli.datamodule, cli.folder)
    if is_first and whole is not None:
        is_run = cli.config.pieces is not None or whole.is_complete(cli.datamodule.store.pieces)
        result |= tell_pieces(whole, pieces_file if is_run else None)
    if cli.config.ablate and whole is not None:
        without = ablations(cli.model, lambda: run_once(cli.model, cli.datamodule, verbose=False))
        if is_first:
            result |= tell_savings(savings(whole, without))
    if not is_first:
        return 0
    print(f"next: dsmr generate --checkpoint {shlex.quote(str(cli.folder))} --output music.mid")
    write_result(result, as_json=cli.as_json, output=output)
    return 0


def file_of_pieces(cli: DsmrCLI) -> Path | None:
    """Where results by piece go: beside the weights, in a file of their own for other weights than the best.

    None where it is not the run as it was trained: another memory, other pieces, windows or another precision.
    """
    if cli.config.pieces is not None:
        return check_output(cli.config.pieces, option="--pieces")
    assert cli.checkpoint is not None
    if cli.exported:
        section = exported.read_description(cli.exported)["model"]
    else:
        section = read_checkpoint(cli.checkpoint)[SECTION]
    own, present = section["config"], cli.model.backbone.config()
    if any(own.get(name) != present.get(name) for name in ("horizons", "prefix_length")):
        return None
    if not (cli.folder / CONFIG_FILE).is_file():
        return None
    run = yaml.safe_load((cli.folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if not is_as_in_training(run, cli.config.as_dict()):
        return None
    parts = ["pieces"]
    if cli.command == "test":
        parts.append("test")
    if cli.checkpoint.name not in (BEST_FILE, exported.WEIGHTS):
        parts.append(cli.checkpoint.stem)
    return cli.folder / ("_".join(parts) + ".csv")


def predict(cli: DsmrCLI, path: str | None, output: Path | None) -> int:
    """Continue validation pieces, and say where they are."""
    cli.trainer.predict(cli.model, cli.datamodule, return_predictions=False, ckpt_path=path, weights_only=True)
    folder = cli.writer.folder
    print(f"{cli.writer.num_written} continuations in {folder}")
    reference = ["--data.path", cli.config.data.path] if cli.config.data.path else []
    print("next:", shlex.join(["dsmr", "judge", str(folder), *reference]))
    write_result({"folder": str(folder), "num": cli.writer.num_written}, as_json=cli.as_json, output=output)
    return 0


def quieten() -> None:
    """Leave out what Lightning says of itself and what is not for a user to act on."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
