"""Export a trained model as a folder to share; `dsmr.share.exported` lists its files."""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from dsmr import UserError
from dsmr.data.tokenizer import TokenizerSpec, build_tokenizer
from dsmr.model import format_horizons
from dsmr.model.backbone import network_name
from dsmr.results.run_files import find_run_folder
from dsmr.results.runs import Run, read_run
from dsmr.share.description import describe_network
from dsmr.share.exported import CARD, CONFIG, SETTINGS, TOKENIZER, WEIGHTS, is_exported, sha256
from dsmr.share.loading import LoadedModel, load_model
from dsmr.share.model_card import METRICS, choose_licence, write_card

PRIVATE_DATA, PRIVATE_TRAINER = ("path", "cache_dir"), ("default_root_dir", "logger", "callbacks", "plugins")
CLASS_SETTINGS, PUBLIC_PACKAGES = ("backbone", "optimizer", "lr_scheduler"), ("dsmr", "torch", "lightning")


def export_model(given: str | Path, folder: Path, *, licence: str | None = None) -> dict[str, Any]:
    """Export a run (its best checkpoint) or a checkpoint file, and return the content of its `config.json`.

    The new folder appears only when complete. The licence is an identifier of the hub (default: that of the data).
    UserError if the run does not exist, its tokenizer is unknown, or the folder is taken or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not empty; name a new folder")
    if not folder.parent.is_dir():
        raise UserError(f"{folder}: there is no folder {folder.parent}; create it first")
    loaded = load_model(given)
    if is_exported(loaded.path):
        raise UserError(f"{given} is an exported model already; copy the folder")
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.path} names no tokenizer; train with dsmr fit")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        description = _write_files(loaded, loaded.tokenizer, partial, folder.name, licence)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return description


def _write_files(
    loaded: LoadedModel, tokenizer: dict[str, Any], folder: Path, name: str, licence: str | None
) -> dict[str, Any]:
    """Write all files of an exported model, and return the content of its `config.json`."""
    run_folder, run = find_run_folder(loaded.path), None
    if run_folder is not None:
        with suppress(Exception):  # whatever is wrong with these files: the card then omits what they say
            run = read_run(run_folder)
    # cloned, since safetensors refuses tensors that share memory, as the tied weights of a user's network may
    weights = {name: tensor.clone().contiguous() for name, tensor in loaded.backbone.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    vocabulary = dict(build_tokenizer(TokenizerSpec(**tokenizer)).vocab)
    tokens = {"tokenizer": tokenizer, "miditok": version("miditok"), "vocabulary": vocabulary}
    (folder / TOKENIZER).write_text(json.dumps(tokens, indent=1) + "\n", encoding="utf-8")
    if run is not None:
        settings = yaml.safe_dump(public_settings(run, loaded.backbone.horizons), sort_keys=False)
        (folder / SETTINGS).write_text(settings, encoding="utf-8")
    identifier, licence_text = choose_licence(loaded.data, licence)
    description = {
        "library": "dsmr",
        "model": describe_network(loaded.backbone, tokenizer, loaded.data, loaded.tokens_per_second),
        "parameters": sum(parameter.numel() for parameter in loaded.backbone.parameters()),
        "measured": validation_metrics(run),
        "licence": identifier,
        "versions": {name: version(name) for name in ("dsmr", "torch", "miditok", "symusic")},
        "needs": user_classes(loaded, tokenizer, run),
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / CARD).write_text(write_card(name, description, run, licence_text), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return description


def validation_metrics(run: Run | None) -> dict[str, Any]:
    """Return the metrics of a run's best validation, and which part of the split they cover."""
    if run is None or "val/nll" not in run.metrics:
        return {}
    metrics = {name: run.metrics[f"val/{name}"] for name in (*METRICS, "tokens") if f"val/{name}" in run.metrics}
    limit = run.config["trainer"].get("limit_val_batches")
    stride = int(run.config["data"].get("validation_stride", 1))
    parts = [f"every {stride}th piece"] if stride > 1 else []
    parts += [f"limit_val_batches {limit}"] if limit is not None else []
    return metrics | {"split": "validation", "partial": bool(parts), "part": ", ".join(parts) or "the whole split"}


def public_settings(run: Run, horizons: Sequence[int]) -> dict[str, Any]:
    """Copy a run's settings without paths, loggers and callbacks, with expanded horizons for a schedule's class."""
    settings: dict[str, Any] = json.loads(json.dumps(run.config))
    for section, names in (("data", PRIVATE_DATA), ("trainer", PRIVATE_TRAINER)):
        settings[section] |= {name: None for name in names if name in settings[section]}
    if "root" in settings:
        settings["root"] = "runs"
    if horizons:
        settings["model"]["horizons"] = format_horizons(horizons)
    return settings


def user_classes(loaded: LoadedModel, tokenizer: dict[str, Any], run: Run | None) -> list[str]:
    """Return class paths of the user's own network, rule, tokenizer and training classes, whose source is needed."""
    settings = {} if run is None else run.config["model"]
    chosen = [settings[key].get("class_path", "") for key in CLASS_SETTINGS if isinstance(settings.get(key), dict)]
    paths = [network_name(type(loaded.backbone)), loaded.backbone.rule, str(tokenizer["name"]), *chosen]
    return list(dict.fromkeys(path for path in paths if "." in path and path.partition(".")[0] not in PUBLIC_PACKAGES))
