"""What `dsmr validate` and `test` say of pieces: intervals, positions, families of tokens, the worth of memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmr.results.bootstrap import Comparison, Interval, missing_interval_note, ratio_interval
from dsmr.results.piece_table import PieceTable

READ = ("recall", "windows", "tokenizer", "validation_stride")
"""Settings of `data` that say which tokens an evaluation scores, and after what; `path` is compared as a place."""


def is_as_in_training(run: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
    """Whether an evaluation scores what the run's own validations scored, in the same precision.

    Args:
        run: settings of the run, as of its `config.yaml`.
        present: settings of the evaluation.
    """
    return evaluated(run) == evaluated(present)


def evaluated(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which results an evaluation has, but for the network."""
    data, path = config["data"], config["data"].get("path")
    found = {name: data.get(name) for name in READ}
    found["path"] = path and str(Path(path).expanduser().resolve())
    precision = str(config["trainer"].get("precision") or "32-true")
    found["precision"] = {"32": "32-true", "64": "64-true"}.get(precision, precision)
    as_kept: dict[str, Any] = json.loads(json.dumps(found))  # YAML knows no tuples
    return as_kept


def tell_pieces(table: PieceTable, path: Path | None) -> dict[str, Any]:
    """Print figures with their intervals over pieces, and keep the table; gives them as a result.

    Args:
        table: of all pieces that were scored.
        path: of its file; None for none.
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
    lines |= {f"perplexity from token {int(start):,}": figure for start, figure in found["position"].items()}
    lines |= {f"nats per token of {name}": figure for name, figure in found["family"].items()}
    print(f"  over {found['num_pieces']} pieces, with 95 % intervals over pieces:")
    for name, figure in lines.items():
        if figure is not None:
            print(f"    {name:<32}{figure:8.3f}")
    found["without_interval"] = missing_interval_note(lines.values())
    if found["without_interval"]:
        print(f"    ({found['without_interval']})")
    if path is None:
        print(
            "  pieces.csv of the run is left as it is, since this is not how it was trained; --pieces FILE writes one"
        )
    else:
        table.write(path)
        print(f"  by piece: {path}")
    return {"by_piece": None if path is None else str(path), "intervals": plain(found)}


def tell_savings(savings: dict[str, Comparison]) -> dict[str, Any]:
    """Print what is lost without each layer's memory; gives it as a result."""
    print("  nats per note that the memory saves, the same weights without it:")
    for name, saving in savings.items():
        what = "all layers" if name == "all" else f"layer {name}"
        print(f"    {what:<32}{saving.difference:8.3f}")
    why = missing_interval_note(saving.difference for saving in savings.values())
    if why:
        print(f"    ({why})")
    return {"ablated": {name: plain(saving.difference) for name, saving in savings.items()}}


def plain(value: Any) -> Any:
    """Numbers, lists and texts, for JSON."""
    if isinstance(value, Interval):
        return {"value": value.value, "low": value.low, "high": value.high, "pieces": value.num_pieces}
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if part is not None}
    return value
