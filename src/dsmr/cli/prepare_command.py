"""`dsmr prepare`: MIDI into the token store, and a report of what was refused."""

import shlex
import time
from collections import Counter
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from dsmr import UserError
from dsmr.cli.configs import data_options, has_training_settings, take_flag
from dsmr.cli.json_output import check_output, write_result
from dsmr.cli.lightning import DsmrCLI
from dsmr.cli.progress import bar
from dsmr.data.maestro import MAESTRO_LICENCE, download_maestro
from dsmr.data.store import cache_folder
from dsmr.results.run_files import CONFIG_FILE


class PrepareCLI(DsmrCLI):
    """The same configuration as training, of which only the data is built."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:  # noqa: D102
        super().add_arguments_to_parser(parser)
        parser.add_argument("--download", action="store_true", help="Fetch MAESTRO (58 MB) into the cache first.")

    def instantiate_classes(self) -> None:
        """Build the datamodule and no model."""
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule = self.config_init.data


def following(arguments: list[str], checkpoint: Path | None, *, has_validation: bool) -> str:
    """The command that trains on the store: with all options that decided it."""
    options = data_options(arguments)
    if checkpoint is not None:
        options = ["--config", str(checkpoint.parent / CONFIG_FILE), *options]
    if not has_training_settings(options):
        options = ["--config", "laptop", *options]
    if not has_validation:
        options += ["--trainer.limit_val_batches", "0"]
    return shlex.join(["dsmr", "fit", *options])


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr prepare`."""
    wants_download, arguments = take_flag(arguments, "--download")
    cli = PrepareCLI(command, arguments)
    output = check_output(cli.config.output)
    if wants_download:
        if cli.datamodule.path or cli.datamodule.recall:
            raise UserError("--download fetches MAESTRO; leave out data.path and data.recall")
        print(MAESTRO_LICENCE)
        cli.datamodule.path = str(download_maestro(cache_folder(cli.datamodule.cache_dir)))
    cli.datamodule.progress = bar("tokenising")
    began = time.perf_counter()
    store = cli.datamodule.store
    seconds = time.perf_counter() - began
    splits = Counter(piece.split for piece in store.pieces)
    tokens = sum(piece.length for piece in store.pieces)
    events = tokens - 2 * len(store.pieces)
    notes = sum(piece.num_notes for piece in store.pieces)
    hours = sum(piece.seconds for piece in store.pieces) / 3600
    for name, reason in store.refused.items():
        print(f"refused {name}: {reason}")
    unended = {piece.name: piece.num_unended for piece in store.pieces if piece.num_unended}
    for name, count in unended.items():
        print(f"kept {name} without {count} note{'s' if count > 1 else ''} that never end{'' if count > 1 else 's'}")
    print(
        f"{store.description}: {len(store.pieces):,} pieces "
        f"({', '.join(f'{count:,} {split}' for split, count in splits.items())}), "
        f"{len(store.refused)} refused, {hours:.1f} hours, {notes:,} notes, {tokens:,} tokens "
        f"({events / notes:.2f} per note, {store.tokens_per_second:.1f} per second), {seconds:.0f} s"
    )
    print(f"token store: {store.path}")
    print(f"next: {following(arguments, cli.checkpoint, has_validation='validation' in splits)}")
    result = {
        "store": str(store.path),
        "pieces": dict(splits),
        "refused": store.refused,
        "unended_notes": unended,
        "tokens": tokens,
        "notes": notes,
        "hours": hours,
        "seconds": seconds,
    }
    write_result(result, as_json=cli.as_json, output=output)
    return 0
