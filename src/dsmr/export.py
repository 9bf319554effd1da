"""A run as a folder to hand on: see `dsmr.exported` for what is in it."""

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from dsmr import checkpoint as checkpoints
from dsmr.data.tokenizer import TokenizerSpec, build_tokenizer
from dsmr.exported import CARD, CONFIG, SETTINGS, TOKENIZER, WEIGHTS, is_exported, sha256
from dsmr.model import format_horizons
from dsmr.report.collect import CONFIG as RUN_CONFIG
from dsmr.report.collect import Run, read_run

PATHS = (("root",), ("data", "path"), ("data", "cache_dir"), ("trainer", "default_root_dir"))
PERSONAL = (("trainer", "logger"), ("trainer", "callbacks"), ("trainer", "plugins"))
COLUMNS = ("nll", "perplexity", "nats_per_note", "nats_per_second")
UNKNOWN = "unknown"
LICENCES = {
    "MAESTRO": (
        "cc-by-nc-sa-4.0",
        "MAESTRO v3.0.0 (Hawthorne et al., *Enabling Factorized Piano Music Modeling and Generation with the MAESTRO "
        "Dataset*, ICLR 2019; Google LLC), CC BY-NC-SA 4.0. A model trained on it is not for commercial use; name the "
        "source, and hand it on under the same licence.",
    ),
    "generated recall pieces": ("apache-2.0", "Pieces that dsmr generates by itself: no music of anybody's."),
}
OTHERS = (
    "other",
    "The licence of the pieces that it was trained on is not known to this program: before you hand the model on, "
    "make sure that you may, and say here under which licence.",
)


def export(given: str | Path, folder: Path, *, licence: str | None = None) -> dict[str, Any]:
    """Write an exported model; gives what its `config.json` says.

    Args:
        given: a run (its best) or a checkpoint file.
        folder: a new one, which appears when it is complete.
        licence: of the model, as the hub spells it; None follows from the data.

    Raises:
        ValueError: there is no such run, no tokenizer is known, or the folder is taken or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and is not empty; name a new folder")
    if not folder.parent.is_dir():
        raise ValueError(f"{folder}: there is no folder {folder.parent}; make it first")
    loaded = checkpoints.load(given)
    if is_exported(loaded.path):
        raise ValueError(f"{given} is an exported model already; copy the folder")
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.path} names no tokenizer; train with dsmr fit")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        description = _write(loaded, partial, folder.name, licence)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise ValueError(f"cannot write {folder} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return description


def _write(loaded: checkpoints.Loaded, folder: Path, name: str, licence: str | None) -> dict[str, Any]:
    """All files of an exported model; gives what its `config.json` says."""
    assert loaded.tokenizer is not None
    run = _run_of(loaded.path)
    tokenizer = build_tokenizer(TokenizerSpec(**loaded.tokenizer))
    identifier, text = LICENCES.get(loaded.data or UNKNOWN, OTHERS)
    weights = {name: tensor.detach().contiguous() for name, tensor in loaded.backbone.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    vocabulary = {"tokenizer": loaded.tokenizer, "miditok": version("miditok"), "vocabulary": dict(tokenizer.vocab)}
    (folder / TOKENIZER).write_text(json.dumps(vocabulary, indent=1) + "\n", encoding="utf-8")
    if run is not None:
        (folder / SETTINGS).write_text(yaml.safe_dump(without_paths(run.config), sort_keys=False), encoding="utf-8")
    description = {
        "library": "dsmr",
        "model": checkpoints.describe(loaded.backbone, loaded.tokenizer, loaded.data, loaded.tokens_per_second),
        "parameters": sum(weight.numel() for weight in weights.values()),
        "measured": measured(run),
        "licence": licence or identifier,
        "versions": {name: version(name) for name in ("dsmr", "torch", "miditok", "symusic")},
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
    known = [] if loaded.data not in LICENCES and licence else [text]
    card = model_card(name, description, run, "\n\n".join([f"Of this model: {licence}."] * bool(licence) + known))
    (folder / CARD).write_text(card, encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return description


def _run_of(checkpoint: Path) -> Run | None:
    """The run beside a checkpoint, if its settings and metrics are there."""
    if not (checkpoint.parent / RUN_CONFIG).is_file():
        return None
    try:
        return read_run(checkpoint.parent)
    except (ValueError, OSError):
        return None


def measured(run: Run | None) -> dict[str, Any]:
    """The figures of the run's best validation, and on how much of the split."""
    if run is None or "val/nll" not in run.figures:
        return {}
    found = {name: run.figures[f"val/{name}"] for name in (*COLUMNS, "tokens") if f"val/{name}" in run.figures}
    limit = run.config["trainer"].get("limit_val_batches")
    stride = int(run.config["data"].get("validation_stride", 1))
    parts = [f"every {stride}th piece"] if stride > 1 else []
    parts += [f"limit_val_batches {limit}"] if limit is not None else []
    return found | {"split": "validation", "partial": bool(parts), "part": ", ".join(parts) or "the whole split"}


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run without what only its own machine has."""
    made: dict[str, Any] = json.loads(json.dumps(config))
    for *parents, name in PATHS + PERSONAL:
        part = made
        for parent in parents:
            part = part.get(parent) or {}
        if name in part:
            part[name] = "runs" if name == "root" else None
    return made


def own_class(tokenizer: str) -> list[str]:
    """What a user of a tokenizer class outside of MidiTok needs to know."""
    if "." not in tokenizer:
        return []
    return [
        "",
        f"Its tokens are those of the Python class `{tokenizer}`, which is not in this folder: install it first.",
    ]


def model_card(name: str, description: Mapping[str, Any], run: Run | None, licence: str) -> str:
    """README.md, in the hub's format."""
    model, figures = description["model"], description["measured"]
    config, horizons = model["config"], model["config"].get("horizons")
    spelling = format_horizons(horizons) if horizons else f"none; a prefix of {config.get('prefix_length')} tokens"
    rate = checkpoints.token_rate(model)
    about = "" if rate is None else f", about {rate.seconds(config['segment_length']):.0f} {rate.label}"
    lines = [
        "---",
        f"license: {description['licence']}",
        "library_name: dsmr",
        "tags: [music, midi, piano, symbolic-music, depth-structured-music-recurrence]",
        "---",
        "",
        f"# {name}",
        "",
        "A language model of piano performances that reads a piece segment by segment; every layer remembers its own",
        "number of past tokens (Depth-Structured Music Recurrence, arXiv 2602.19816), made with `dsmr`.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {description['parameters']:,} |",
        f"| layers, width, heads | {config['num_layers']}, {config['d_model']}, {config['num_heads']} |",
        f"| horizons, bottom to top | `{spelling}` |",
        f"| segment | {config['segment_length']} tokens{about} |",
        f"| tokens | {model['tokenizer']['name']}, {config['vocab_size']} |",
        f"| trained on | {model.get('data') or 'not recorded'} |",
    ]
    if run is not None:
        steps, per_step = run.figures["steps"], run.tokens_per_step
        lines += [f"| training | {steps:,} steps of {per_step:,} tokens, {steps * per_step / 1e6:,.1f} M tokens |"]
    lines += ["", "## Measured", ""]
    if figures:
        lines += [
            f"On {figures['tokens']:,.0f} tokens of the validation split ({figures['part']}), whole pieces. A "
            "perplexity compares only with others of the same tokens on the same pieces.",
            "",
            "| NLL, nats per token | perplexity | nats per note | nats per second |",
            "|---|---|---|---|",
            "| " + " | ".join(f"{figures[name]:.4f}" if name in figures else "" for name in COLUMNS) + " |",
        ]
    else:
        lines += ["Nothing: the run was never validated, or its metrics were not beside the checkpoint."]
    lines += [
        "",
        "## Use",
        "",
        "    pip install dsmr",
        f"    dsmr generate --checkpoint {name} --prompt IN.mid --prompt-seconds 30 --output OUT.mid",
        *own_class(model["tokenizer"]["name"]),
        "",
        "## Licence of what it learned from",
        "",
        licence,
        "",
        "## Limits",
        "",
        "Piano alone; of its pedals the sustain pedal alone, folded into the length of notes. It knows the style of",
        "its training pieces and no other, and may repeat passages of them: `dsmr evaluate` measures how long.",
    ]
    return "\n".join(lines) + "\n"
