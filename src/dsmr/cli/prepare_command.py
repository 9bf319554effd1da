"""`dsmr prepare`: tokenize MIDI into the token store, and report the files that were refused."""

import shlex
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

from dsmr import UserError
from dsmr.cli.common_options import Options, bar, check_output, write_result
from dsmr.cli.config_files import grouped, has_training_settings, left_out
from dsmr.cli.lightning_cli import DsmrCLI
from dsmr.cli.parser import underscored
from dsmr.data.maestro import MAESTRO_LICENCE, download_maestro
from dsmr.data.store import cache_folder
from dsmr.results.run_files import CONFIG_FILE


class PrepareCLI(DsmrCLI):
    """The settings of training, from which only the data are built."""

    options: ClassVar[Options] = {"--download": (None, False, "Download MAESTRO (58 MB) into the cache first.")}

    def instantiate_classes(self) -> None:
        """Build the datamodule alone."""
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule = self.config_init.data


def training_command(arguments: list[str], run: Path | None, *, has_validation: bool) -> str:
    """Return the command that trains on the store, with all options of `dsmr prepare` that `dsmr fit` takes.

    The settings of a run given by `--checkpoint` are repeated under another name.
    """
    options = left_out(underscored(arguments), ("--download", "--checkpoint", "--ckpt_path", "--output", "--json"))
    if run is not None:
        name = [] if "--name" in dict(grouped(options)) else ["--name", f"{run.name}-again"]
        options = ["--config", str(run / CONFIG_FILE), *options, *name]
    elif not has_training_settings(options):
        options = ["--config", "laptop", *options]
    if not has_validation:
        options += ["--trainer.limit_val_batches", "0"]
    return shlex.join(["dsmr", "fit", *options])


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr prepare`."""
    cli = PrepareCLI(command, arguments)
    output = check_output(cli.config.output)
    if cli.config.download:
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
        f"({(tokens - 2 * len(store.pieces)) / notes:.2f} per note, {store.tokens_per_second:.1f} per second), "
        f"{seconds:.0f} s"
    )
    print(f"token store: {store.path}")
    trained = cli.folder if cli.checkpoint else None
    print("next:", training_command(arguments, trained, has_validation="validation" in splits))
    totals = {"tokens": tokens, "notes": notes, "hours": hours, "seconds": seconds}
    files = {"pieces": dict(splits), "refused": store.refused, "unended_notes": unended}
    result = {"store": str(store.path), **files, **totals}
    write_result(result, as_json=cli.config.json, output=output)
    return 0
