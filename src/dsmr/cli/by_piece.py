"""Results of `dsmr validate` and `test` over pieces: intervals, positions and families of tokens."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmr.analyze.layers import interval_dict
from dsmr.results.bootstrap import Interval, missing_interval_note, ratio_interval
from dsmr.results.piece_table import PieceTable

DATA_SETTINGS = ("recall", "windows", "tokenizer", "validation_stride")
"""Settings of `data` that decide which tokens are scored, and with which context; paths are compared resolved."""


def is_as_in_training(run: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
    """Return True if an evaluation scores the pieces of the run's own validations, in the same precision.

    Args:
        run: settings of the run, from its `config.yaml`.
        present: settings of the evaluation.
    """
    return scoring_settings(run) == scoring_settings(present)


def scoring_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide the results of an evaluation, except for those of the network."""
    data, path = config["data"], config["data"].get("path")
    found = {name: data.get(name) for name in DATA_SETTINGS}
    found["path"] = path and str(Path(path).expanduser().resolve())
    precision = str(config["trainer"].get("precision") or "32-true")
    found["precision"] = {"32": "32-true", "64": "64-true"}.get(precision, precision)
    as_saved: dict[str, Any] = json.loads(json.dumps(found))  # YAML has no tuples
    return as_saved


def tell_pieces(table: PieceTable, path: Path | None) -> dict[str, Any]:
    """Print metrics with their intervals over pieces and save the table; return the metrics for JSON.

    Args:
        table: results by piece.
        path: CSV file; None to save nothing.
    """
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
        print(
            "  pieces.csv of the run is not changed, since these are not the settings of its training; --pieces FILE "
            "writes another"
        )
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
