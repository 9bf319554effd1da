"""`dsmr fit`, `validate` and `test`: train a model or evaluate a trained one with Lightning's Trainer."""

import shlex
import signal
from pathlib import Path

from dsmr import UserError
from dsmr.cli.common_options import bar, check_output, write_result
from dsmr.cli.library_errors import errors_of_training
from dsmr.cli.lightning_cli import DsmrCLI
from dsmr.cli.outcome import announce, conclude, is_as_in_training, tell_pieces
from dsmr.cli.run_checks import removed_on_error
from dsmr.cli.yaml_values import load_yaml, plain_values
from dsmr.results.run_files import BEST_FILE, CONFIG_FILE, LAST_FILE, SECTION, read_checkpoint
from dsmr.share import exported
from dsmr.share.description import check_rebuilds, check_same_network, describe_network
from dsmr.training.callbacks import LostProcess, Stopped


def run(command: str, arguments: list[str]) -> int:
    """Run `fit`, `validate` or `test`."""
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
    if cli.exported:
        saved, present = exported.read_description(cli.exported)["model"], describe_network(cli.model.backbone, None)
        check_same_network(saved, present, horizons_too=False)
        cli.model.backbone.load_state_dict(exported.read_weights(cli.exported))
    path = None if cli.checkpoint is None or cli.exported else str(cli.checkpoint)
    return (fit if command == "fit" else evaluate)(cli, path, output)


def fit(cli: DsmrCLI, path: str | None, output: Path | None) -> int:
    """Train, and return the exit status."""
    try:
        with removed_on_error(cli.folder), errors_of_training(cli.trainer):
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=path, weights_only=True)
    except Stopped as stopped:
        if not cli.trainer.is_global_zero:  # Lightning kills all if another than the first returns a status
            return 0
        print(f"stopped after step {cli.trainer.global_step:,} ({stopped.reason}); saved {cli.folder / LAST_FILE}")
        print(f"next: dsmr fit --resume {shlex.quote(str(cli.folder))}")
        return stopped.status
    except RuntimeError:
        callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(one, LostProcess) and one.is_lost for one in callbacks):
            raise
        if cli.trainer.strategy.launcher is not None:  # processes that hang react to no other signal
            cli.trainer.strategy.launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))
        return 2
    if cli.trainer.is_global_zero:
        steps = cli.trained.global_step if cli.trained else 0
        if steps and cli.trainer.global_step == steps:
            print(f"nothing was left to train: {steps:,} steps are done; raise trainer.max_steps to continue")
        result = conclude("fit", cli.trainer, cli.model, cli.datamodule, cli.folder)
        write_result(result, as_json=cli.config.json, output=output)
    return 0


def evaluate(cli: DsmrCLI, path: str | None, output: Path | None) -> int:
    """Evaluate, and return the exit status."""
    pieces_file = file_of_pieces(cli)
    run_once = cli.trainer.validate if cli.command == "validate" else cli.trainer.test
    run_once(cli.model, cli.datamodule, ckpt_path=path, weights_only=True, verbose=False)
    if not cli.trainer.is_global_zero:
        return 0
    result = conclude(cli.command, cli.trainer, cli.model, cli.datamodule, cli.folder)
    table = cli.model.piece_table
    if table is not None:
        is_whole = cli.config.pieces is not None or table.is_complete(cli.datamodule.store.pieces)
        result |= tell_pieces(table, pieces_file if is_whole else None)
    print(f"next: dsmr generate --checkpoint {shlex.quote(str(cli.folder))} --output music.mid")
    write_result(result, as_json=cli.config.json, output=output)
    return 0


def file_of_pieces(cli: DsmrCLI) -> Path | None:
    """Return the file for the results of each piece; weights other than the best have a file of their own.

    None if the evaluation is not as in training: other horizons, pieces or windows, or another precision.
    """
    if cli.config.pieces is not None:
        return check_output(cli.config.pieces, option="--pieces")
    assert cli.checkpoint is not None
    folder = cli.exported
    section = exported.read_description(folder)["model"] if folder else read_checkpoint(cli.checkpoint)[SECTION]
    own, present = section["config"], cli.model.backbone.config()
    is_same = all(own.get(name) == present.get(name) for name in ("horizons", "prefix_length"))
    if not is_same or not (cli.folder / CONFIG_FILE).is_file():
        return None
    run = plain_values(load_yaml((cli.folder / CONFIG_FILE).read_text(encoding="utf-8")))
    if not is_as_in_training(run, cli.config.as_dict()):
        return None
    is_best = cli.checkpoint.name in (BEST_FILE, exported.WEIGHTS)
    split, weights = "_test" if cli.command == "test" else "", "" if is_best else f"_{cli.checkpoint.stem}"
    return cli.folder / f"pieces{split}{weights}.csv"
