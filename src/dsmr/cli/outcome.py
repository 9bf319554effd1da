"""What `fit`, `validate` and `test` print before and after their work."""

import math
import shlex
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only

from dsmr.cost import MIB
from dsmr.data.datamodule import MusicData
from dsmr.data.sources import Split
from dsmr.model.backbone import network_summary
from dsmr.model.horizons import TokenRate
from dsmr.results.run_files import BEST_FILE, LAST_FILE
from dsmr.training.module import RecurrentLM


@rank_zero_only
def announce(model: RecurrentLM, data: MusicData, trainer: Trainer) -> None:
    """Print the horizons of the layers, the number of parameters, and the memory in the compute precision."""
    backbone, precision = model.backbone, str(trainer.precision)
    parameters = sum(p.numel() for p in backbone.parameters())
    size = backbone.state_bytes(data.num_lanes, 2 if "16" in precision else 8 if "64" in precision else 4)
    print(network_summary(backbone, TokenRate(data.tokens_per_second)))
    print(f"{parameters:,} parameters, memory {size / MIB:,.1f} MiB at {data.num_lanes} lanes", flush=True)


def conclude(
    command: str,
    trainer: Trainer,
    model: RecurrentLM,
    data: MusicData,
    folder: Path,
) -> dict[str, Any]:
    """Print the metrics and, after training, the next useful command; return the result for JSON."""
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    metrics = {name: value for name, value in logged.items() if math.isfinite(value)}
    for name, value in metrics.items():
        if not name.endswith("/tokens") and "/position/" not in name and "/family/" not in name:
            print(f"  {name:<28}{value:12.4f}")
    stretches = [f"{n.rpartition('_')[2]}: {value:.2f}" for n, value in metrics.items() if "/position/" in n]
    if stretches and command == "fit":
        print(f"  perplexity by position in the piece, from token {', '.join(stretches)}")
    result: dict[str, Any] = {
        "command": command,
        "run": str(folder),
        "horizons": list(model.backbone.horizons),
        "metrics": metrics,
    }
    split: Split = "test" if command == "test" else "validation"
    seen = metrics.get("test/tokens" if split == "test" else "val/tokens")
    if seen:
        pieces = data.pieces(split)
        tokens = sum(data.store.pieces[number].length - 1 for number in data.store.of_split(split))
        whole = (
            f"partial: {seen / tokens:.1%} of the split's {tokens:,} tokens" if seen != tokens else "the whole split"
        )
        print(f"  on {seen:,.0f} tokens of {len(pieces)} {split} pieces ({whole})")
        result |= {"split": split, "partial": seen != tokens}
    if command == "fit":
        is_scored = (folder / BEST_FILE).is_file() or trainer.fast_dev_run  # type: ignore[attr-defined]
        run = shlex.quote(str(folder))
        if is_scored:
            print(f"next: dsmr validate --checkpoint {run}")
        elif not trainer.limit_val_batches:
            print(f"trained without validation, so there is no {BEST_FILE}; other commands use {LAST_FILE}")
            print(f"next: dsmr generate --checkpoint {run} --output music.mid")
        else:
            print("no validation ran, so there is no best checkpoint: lower trainer.val_check_interval")
            print(f"next: dsmr fit --resume {run}")
    return result
