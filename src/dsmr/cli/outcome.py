"""Print what `fit`, `validate` and `test` work on, and their results."""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only

from dsmr.analyze.layers import interval_dict
from dsmr.cost import MIB
from dsmr.data.datamodule import MusicData
from dsmr.data.sources import Split
from dsmr.model.backbone import network_summary
from dsmr.model.horizons import TokenRate
from dsmr.results.bootstrap import Interval, missing_interval_note, ratio_interval
from dsmr.results.piece_table import PieceTable
from dsmr.results.run_files import BEST_FILE, LAST_FILE
from dsmr.training.module import RecurrentLM

DATA_SETTINGS = ("recall", "windows", "tokenizer", "validation_stride")
"""Settings of `data` that decide which tokens are scored, and with which context; paths are compared resolved."""


@rank_zero_only
def announce(model: RecurrentLM, data: MusicData, trainer: Trainer) -> None:
    """Print the horizons of the layers, the number of parameters, and the memory in the compute precision."""
    backbone, precision = model.backbone, str(trainer.precision)
    parameters = sum(p.numel() for p in backbone.parameters())
    size = backbone.state_bytes(data.num_lanes, 2 if "16" in precision else 8 if "64" in precision else 4)
    print(network_summary(backbone, TokenRate(data.tokens_per_second)))
    print(f"{parameters:,} parameters, memory {size / MIB:,.1f} MiB at {data.num_lanes} lanes", flush=True)


def conclude(command: str, trainer: Trainer, model: RecurrentLM, data: MusicData, folder: Path) -> dict[str, Any]:
    """Print the metrics and, after training, the next useful command; return the result for JSON."""
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    metrics = {name: value for name, value in logged.items() if math.isfinite(value)}
    for name, value in metrics.items():
        if not name.endswith("/tokens") and "/position/" not in name and "/family/" not in name:
            print(f"  {name:<28}{value:12.4f}")
    stretches = [f"{n.rpartition('_')[2]}: {value:.2f}" for n, value in metrics.items() if "/position/" in n]
    if stretches and command == "fit":
        print(f"  perplexity by position in the piece, from token {', '.join(stretches)}")
    horizons = list(model.backbone.horizons)
    result: dict[str, Any] = {"command": command, "run": str(folder), "horizons": horizons, "metrics": metrics}
    split: Split = "test" if command == "test" else "validation"
    seen = metrics.get("test/tokens" if split == "test" else "val/tokens")
    if seen:
        tokens = sum(data.store.pieces[number].length - 1 for number in data.store.of_split(split))
        share = f"partial: {seen / tokens:.1%} of the split's {tokens:,} tokens"
        whole = "the whole split" if seen == tokens else share
        print(f"  on {seen:,.0f} tokens of {len(data.pieces(split))} {split} pieces ({whole})")
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


def is_as_in_training(run: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
    """Return True if an evaluation scores the pieces of the run's own validations, in the same precision."""

    def scoring(config: Mapping[str, Any]) -> Any:
        data, path = config["data"], config["data"].get("path")
        found = {name: data.get(name) for name in DATA_SETTINGS}
        found["path"] = path and str(Path(path).expanduser().resolve())
        precision = str(config["trainer"].get("precision") or "32-true")
        found["precision"] = {"32": "32-true", "64": "64-true"}.get(precision, precision)
        return json.loads(json.dumps(found))  # YAML has no tuples

    return bool(scoring(run) == scoring(present))


def tell_pieces(table: PieceTable, path: Path | None) -> dict[str, Any]:
    """Print metrics with their intervals over pieces and save the table as CSV; return the metrics for JSON."""
    families = zip(table.families, table.nll_PF.T, table.tokens_PF.T, strict=True)
    starts = zip(table.starts, table.nll_PK.T, table.tokens_PK.T, strict=True)
    found: dict[str, Any] = {
        "num_pieces": len(table.names),
        "perplexity": ratio_interval(table.nll_P, table.tokens_P, is_exp=True),
        "nats_per_note": ratio_interval(table.nll_P, table.notes_P),
        "family": {name: ratio_interval(nll_P, tokens_P) for name, nll_P, tokens_P in families},
        "position": {str(start): ratio_interval(nll_P, tokens_P, is_exp=True) for start, nll_P, tokens_P in starts},
    }
    lines = {"perplexity": found["perplexity"], "nats per note": found["nats_per_note"]}
    lines |= {f"perplexity from token {int(start):,}": metric for start, metric in found["position"].items()}
    lines |= {f"nats per token of {name}": metric for name, metric in found["family"].items()}
    print(f"  over {found['num_pieces']} pieces, with 95 % intervals over pieces:")
    for name, metric in lines.items():
        if metric is not None:
            print(f"    {name:<32}{metric:8.3f}")
    found["without_interval"] = missing_interval_note(lines.values())
    if found["without_interval"]:
        print(f"    ({found['without_interval']})")
    if path is None:
        print("  pieces.csv of the run is not changed, since these are not the settings of its training; ", end="")
        print("--pieces FILE writes another")
    else:
        table.write(path)
        print(f"  by piece: {path}")
    return {"by_piece": None if path is None else str(path), "intervals": plain(found)}


def plain(value: Any) -> Any:
    """Convert intervals to dictionaries, for JSON, and leave out what is None."""
    if isinstance(value, Interval):
        return interval_dict(value)
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if part is not None}
    return value
