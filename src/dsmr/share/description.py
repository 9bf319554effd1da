"""Describe a network in a checkpoint or an exported model, so that the file alone rebuilds it.

A built-in network is named by its class, a user's network by its class path, whose module is imported to load it.
Horizons are stored expanded, never as a schedule's class.
"""

import importlib
import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml

from dsmr import UserError
from dsmr import model as networks
from dsmr.model import Backbone, format_horizons
from dsmr.model.backbone import build_on_meta, is_builtin, network_name
from dsmr.model.sizes import Settings
from dsmr.results.run_files import CONFIG_FILE, FORMAT_VERSION


def describe_network(
    backbone: Backbone,
    tokenizer: dict[str, Any] | None,
    data: str | None = None,
    tokens_per_second: float | None = None,
) -> dict[str, Any]:
    """Describe a network, its tokenizer and its training data: the section `dsmr` of a checkpoint."""
    return {
        "format_version": FORMAT_VERSION,
        "backbone": network_name(type(backbone)),
        "config": plain_config(backbone),
        "rule": backbone.rule,
        "horizons": list(backbone.horizons),
        "segment_length": backbone.segment_length,
        "vocab_size": backbone.vocab_size,
        "tokenizer": tokenizer,
        "data": data,
        "tokens_per_second": tokens_per_second,
    }


def plain_config(backbone: Backbone) -> dict[str, Any]:
    """Return `config()` of a network in JSON types (tuples become lists); other types raise UserError."""
    plain: dict[str, Any] = {}
    for key, value in backbone.config().items():
        try:
            plain[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{network_name(type(backbone))}: config() holds {key} = {value!r} ({type(value).__name__}), which a "
                "checkpoint cannot store; give numbers, strings, lists or None"
            ) from error
    return plain


def check_rebuilds(backbone: Backbone) -> None:
    """Raise UserError for a user's network that a checkpoint could not rebuild, before it is trained."""
    network, config = type(backbone), plain_config(backbone)
    name = network_name(network)
    if is_builtin(name):
        return
    fix = "let config() return every argument of the constructor"
    if "<locals>" in name or network.__module__ == "__main__":
        raise UserError(f"{name} cannot be imported again; define the network at the top of a module")
    known = next(
        (base for base in network.__mro__ if issubclass(base, Backbone) and is_builtin(network_name(base))), None
    )
    inherited = {*inspect.signature(known).parameters, *(field.name for field in fields(Settings))} if known else set()
    missing = [
        key
        for key, parameter in inspect.signature(network).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and key not in {*config, *network.OPTIONS, *inherited}
    ]
    if missing:
        raise UserError(f"{name} takes {', '.join(missing)}, but its config() omits this; {fix}")
    try:
        with torch.random.fork_rng(devices=[]):
            rebuilt = build_on_meta(lambda: network.rebuild(config))
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be rebuilt from its config() ({error}); {fix}") from error
    shapes = [{key: weight.shape for key, weight in one.state_dict().items()} for one in (backbone, rebuilt)]
    if shapes[0] != shapes[1] or plain_config(rebuilt) != config:
        raise UserError(f"{name} becomes another network when it is rebuilt from its config(); {fix}")


def check_same_network(saved: dict[str, Any], present: dict[str, Any], *, horizons_too: bool) -> None:
    """Raise UserError if a network differs from the saved one; both are given as of `describe_network`.

    The weights do not depend on horizons and prefix, which are compared only if `horizons_too`, as resuming requires.
    They do depend on the segment length, which is part of the function under the `boundary` rule.
    """
    settings = [{"backbone": one["backbone"], "rule": one["rule"]} | one["config"] for one in (saved, present)]
    if not hasattr(networks, saved["backbone"]) and is_builtin(saved["backbone"]):  # before class paths were kept
        settings[1]["backbone"] = present["backbone"].rpartition(".")[2]
    free = {"dropout", "init_std", "memory_block"} | (set() if horizons_too else {"horizons", "prefix_length"})
    for known in settings:  # only its presence matters: its values are weights
        known["memory_gate"] = known.get("memory_gate") is not None
    for name, first in settings[0].items():
        second = settings[1].get(name)
        if name in free or first == second:
            continue
        if name == "horizons":
            first, second = (value and format_horizons(value) for value in (first, second))
        raise UserError(
            f"the checkpoint was trained with {name} = {first}, now it is {second}; use the run's own value, or "
            "begin a new run"
        )


def network_class(section: dict[str, Any], path: Path) -> type[Backbone]:
    """Return the network class named by a checkpoint, importing a user's module; anything else raises UserError."""
    name: str = section["backbone"]
    network = getattr(networks, name, None)
    if isinstance(network, type) and issubclass(network, Backbone):
        return network
    if is_builtin(name):
        name = _class_path_in_config(name, path)
    if is_builtin(name):
        raise UserError(f"{path}: unknown network {name!r}; update dsmr")
    network = import_class(name, f"{path}: the network {name} is not part of dsmr, and")
    if not (isinstance(network, type) and issubclass(network, Backbone)):
        raise UserError(f"{path}: {name} is not a network: it does not derive from dsmr.model.Backbone")
    return network


def import_class(class_path: str, what: str) -> Any:
    """Import a user's class, such as `mynet.Mine`; `what` begins the message of the UserError if this fails."""
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's module raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{what} its module {module} cannot be used ({reason}); run this in the folder that has "
            f"{module.partition('.')[0]}, or put that folder on PYTHONPATH"
        ) from error


def _class_path_in_config(name: str, path: Path) -> str:
    """Return the class path of a user's network from the settings beside a checkpoint that names only its class."""
    try:
        config = yaml.safe_load((path.parent / CONFIG_FILE).read_text(encoding="utf-8"))
        class_path = str(config["model"]["backbone"]["class_path"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return name
    return class_path if class_path.rpartition(".")[2] == name else name
