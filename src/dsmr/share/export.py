"""A run as a folder to hand on: see `dsmr.share.exported` for what is in it."""

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from dsmr import UserError
from dsmr.data.tokenizer import TokenizerSpec, build_tokenizer
from dsmr.model import format_horizons
from dsmr.model.backbone import is_ours, name_of
from dsmr.model.horizons import token_rate
from dsmr.results.run_files import find_run_folder
from dsmr.results.runs import Run, read_run
from dsmr.share.description import describe_network
from dsmr.share.exported import CARD, CONFIG, SETTINGS, TOKENIZER, WEIGHTS, is_exported, sha256
from dsmr.share.loading import LoadedModel, load_model

PATHS = (("root",), ("data", "path"), ("data", "cache_dir"), ("trainer", "default_root_dir"))
PERSONAL = (("trainer", "logger"), ("trainer", "callbacks"), ("trainer", "plugins"))
CHOSEN, PUBLIC = ("backbone", "optimizer", "lr_scheduler"), ("dsmr", "torch", "lightning")
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
        UserError: there is no such run, no tokenizer is known, or the folder is taken or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not empty; name a new folder")
    if not folder.parent.is_dir():
        raise UserError(f"{folder}: there is no folder {folder.parent}; make it first")
    loaded = load_model(given)
    if is_exported(loaded.path):
        raise UserError(f"{given} is an exported model already; copy the folder")
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.path} names no tokenizer; train with dsmr fit")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        description = _write(loaded, partial, folder.name, licence)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return description


def _write(loaded: LoadedModel, folder: Path, name: str, licence: str | None) -> dict[str, Any]:
    """All files of an exported model; gives what its `config.json` says."""
    assert loaded.tokenizer is not None
    run = _run_of(loaded.path)
    tokenizer = build_tokenizer(TokenizerSpec(**loaded.tokenizer))
    identifier, text = LICENCES.get(loaded.data or UNKNOWN, OTHERS)
    # cloned, since safetensors refuses tensors that share memory, as tied weights of a user's own network do
    weights = {name: tensor.clone().contiguous() for name, tensor in loaded.backbone.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    vocabulary = {"tokenizer": loaded.tokenizer, "miditok": version("miditok"), "vocabulary": dict(tokenizer.vocab)}
    (folder / TOKENIZER).write_text(json.dumps(vocabulary, indent=1) + "\n", encoding="utf-8")
    if run is not None:
        settings = yaml.safe_dump(shared_settings(run, loaded.backbone.horizons), sort_keys=False)
        (folder / SETTINGS).write_text(settings, encoding="utf-8")
    description = {
        "library": "dsmr",
        "model": describe_network(loaded.backbone, loaded.tokenizer, loaded.data, loaded.tokens_per_second),
        "parameters": sum(parameter.numel() for parameter in loaded.backbone.parameters()),
        "measured": measured(run),
        "licence": licence or identifier,
        "versions": {name: version(name) for name in ("dsmr", "torch", "miditok", "symusic")},
        "needs": own_classes(loaded, run),
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
    known = [] if loaded.data not in LICENCES and licence else [text]
    card = model_card(name, description, run, "\n\n".join([f"Of this model: {licence}."] * bool(licence) + known))
    (folder / CARD).write_text(card, encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return description


def _run_of(checkpoint: Path) -> Run | None:
    """The run beside a checkpoint, if its settings and metrics are there."""
    folder = find_run_folder(checkpoint)
    if folder is None:
        return None
    try:
        return read_run(folder)
    except Exception:  # whatever is wrong with what lies beside the weights: the card says that nothing is known
        return None


def measured(run: Run | None) -> dict[str, Any]:
    """The figures of the run's best validation, and on how much of the split."""
    if run is None or "val/nll" not in run.metrics:
        return {}
    found = {name: run.metrics[f"val/{name}"] for name in (*COLUMNS, "tokens") if f"val/{name}" in run.metrics}
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


def shared_settings(run: Run, horizons: Sequence[int]) -> dict[str, Any]:
    """Settings of a run without paths, its horizons as they were expanded: nobody needs the class of a schedule."""
    made = without_paths(run.config)
    if horizons:
        made["model"]["horizons"] = format_horizons(horizons)
    return made


def own_classes(loaded: LoadedModel, run: Run | None) -> list[str]:
    """Class paths of a user's own classes, whose modules must come along: network, tokenizer, and what trained it."""
    assert loaded.tokenizer is not None
    settings = {} if run is None else run.config["model"]
    given = [settings[key].get("class_path", "") for key in CHOSEN if isinstance(settings.get(key), dict)]
    found = [name_of(type(loaded.backbone)), str(loaded.tokenizer["name"]), *given]
    return list(dict.fromkeys(path for path in found if "." in path and path.partition(".")[0] not in PUBLIC))


def needs_text(needs: Sequence[str]) -> list[str]:
    """Lines of the card about code that is not part of dsmr."""
    if not needs:
        return []
    modules = ", ".join(f"`{module}`" for module in dict.fromkeys(path.rpartition(".")[0] for path in needs))
    classes = ", ".join(f"`{path}`" for path in needs)
    return [
        f"It needs code that is not part of dsmr: {classes}. Hand on the source of {modules} with this folder,",
        "and run dsmr where Python finds it: in the folder that has it, or with that folder on PYTHONPATH.",
        "",
    ]


def model_card(name: str, description: Mapping[str, Any], run: Run | None, licence: str) -> str:
    """README.md, in the hub's format."""
    model, figures = description["model"], description["measured"]
    config, horizons = model["config"], model["horizons"]
    spelling = format_horizons(horizons) if horizons else "none"
    if not horizons and "prefix_length" in config:
        spelling = f"none; a prefix of {config['prefix_length']} tokens"
    sizes = [f"{config[key]}" for key in ("num_layers", "d_model", "num_heads") if key in config]
    length, rate = model["segment_length"], token_rate(model)
    about = "" if rate is None else f", about {rate.seconds(length):.0f} {rate.label}"
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
        *([f"| layers, width, heads | {', '.join(sizes)} |"] if len(sizes) == 3 else []),
        *([] if is_ours(model["backbone"]) else [f"| network | `{model['backbone']}` |"]),
        f"| horizons, bottom to top | `{spelling}` |",
        f"| segment | {length} tokens{about} |",
        f"| tokens | {model['tokenizer']['name']}, {model['vocab_size']} |",
        f"| trained on | {model.get('data') or 'not recorded'} |",
    ]
    if run is not None:
        steps, per_step = run.metrics["steps"], run.tokens_per_step
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
        "",
        *needs_text(description["needs"]),
        "## Licence of what it learned from",
        "",
        licence,
        "",
        "## Limits",
        "",
        "Piano alone; of its pedals the sustain pedal alone, folded into the length of notes. It knows the style of",
        "its training pieces and no other, and may repeat passages of them: `dsmr judge` measures how long.",
    ]
    return "\n".join(lines) + "\n"
