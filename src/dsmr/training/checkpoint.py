"""What a checkpoint says about itself, so that it alone rebuilds the network and its tokenizer.

`last.ckpt` is Lightning's whole state with the stream's place and the training memory; `best.ckpt` holds the
weights and cannot resume. Both carry a section `dsmr`: format version, the network's class name and constructor
arguments (horizons expanded, never a schedule's class), the rule, the tokenizer. Checkpoints are read with
`weights_only=True`: tensors, numbers and strings. The run's `run.json` holds the same section, so that reports
need neither weights nor a user's classes.

A network of ours is named by its class; a user's own by its class path, whose module is imported to load it.
"""

import importlib
import inspect
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from dsmr import UserError
from dsmr import model as networks
from dsmr.attention.attend import Form
from dsmr.model import Backbone, format_horizons
from dsmr.model.backbone import is_ours, name_of, without_weights
from dsmr.model.horizons import MAESTRO_RATE, TokenRate
from dsmr.share import exported

FORMAT_VERSION = 2
SECTION = "dsmr"
BEST, LAST = "best.ckpt", "last.ckpt"
CONFIG, RUN = "config.yaml", "run.json"


@dataclass(frozen=True)
class Loaded:
    """A network out of a checkpoint.

    Attributes:
        backbone: with its weights, in evaluation mode.
        tokenizer: `{"name", "config"}` as of `dsmr.data.tokenizer.TokenizerSpec`; None if none was known.
        path: the file.
        vocabulary: ids of all tokens by name, where an exported model has them.
        data: what it was trained on, where that is known: `MAESTRO`, `MIDI files`, ...
        tokens_per_second: of that music; None if it is not known.
    """

    backbone: Backbone
    tokenizer: dict[str, Any] | None
    path: Path
    vocabulary: dict[str, int] | None = None
    data: str | None = None
    tokens_per_second: float | None = None

    @property
    def rate(self) -> TokenRate | None:
        """Tokens in a second of music, see `token_rate`."""
        return token_rate({"tokens_per_second": self.tokens_per_second, "tokenizer": self.tokenizer})


def describe(
    backbone: Backbone,
    tokenizer: dict[str, Any] | None,
    data: str | None = None,
    tokens_per_second: float | None = None,
) -> dict[str, Any]:
    """Section of a checkpoint about the network, its tokenizer and what it was trained on.

    Raises:
        UserError: `config()` of a user's own network holds something else than numbers, texts and lists.
    """
    return {
        "format_version": FORMAT_VERSION,
        "backbone": name_of(type(backbone)),
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
    """`config()` of a network in the types that every checkpoint can hold; tuples become lists.

    Raises:
        UserError: it holds something else.
    """
    plain: dict[str, Any] = {}
    for key, value in backbone.config().items():
        try:
            plain[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{name_of(type(backbone))}: config() holds {key} = {value!r} ({type(value).__name__}), which a "
                "checkpoint cannot keep; give numbers, strings, lists or None"
            ) from error
    return plain


def check_rebuilds(backbone: Backbone) -> None:
    """Refuse a user's own network that a checkpoint could not rebuild, before it is trained.

    Raises:
        UserError: its class cannot be imported, or `config()` leaves out arguments or gives other ones.
    """
    network, config = type(backbone), plain_config(backbone)
    name = name_of(network)
    if is_ours(name):
        return
    fix = "let config() give every argument of the constructor"
    if "<locals>" in name or network.__module__ == "__main__":
        raise UserError(f"{name} cannot be imported again; define the network at the top of a module of its own")
    known = next((base for base in network.__mro__ if issubclass(base, Backbone) and is_ours(name_of(base))), None)
    inherited = inspect.signature(known).parameters if known else {}
    missing = [
        key
        for key, parameter in inspect.signature(network).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and key not in {*config, *network.OPTIONS, *inherited}
    ]
    if missing:
        raise UserError(f"{name} takes {', '.join(missing)}, but its config() leaves this out; {fix}")
    try:
        with torch.random.fork_rng(devices=[]):
            rebuilt = without_weights(lambda: network.rebuild(config))
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be built again from its config() ({error}); {fix}") from error
    shapes = [{key: weight.shape for key, weight in one.state_dict().items()} for one in (backbone, rebuilt)]
    if shapes[0] != shapes[1] or plain_config(rebuilt) != config:
        raise UserError(f"{name} becomes another network when it is built again from its config(); {fix}")


def token_rate(section: Mapping[str, Any]) -> TokenRate | None:
    """Tokens in a second of the music that a network was trained on.

    A section that does not say so, as of older versions, has MAESTRO's with `performance` tokens, and else none.
    """
    known = section.get("tokens_per_second")
    if known is not None:
        return TokenRate(known)
    return MAESTRO_RATE if (section.get("tokenizer") or {}).get("name") == "performance" else None


def check_same(saved: dict[str, Any], present: dict[str, Any], *, horizons_too: bool) -> None:
    """Refuse a network that is not the one that was saved; both are sections as of `describe`.

    Horizons and prefix may differ where nothing is resumed: the weights do not depend on them. The segment length
    may not, since under the `boundary` rule it is part of the function.

    Raises:
        UserError: naming the first setting that differs, with both values.
    """
    names = ("backbone", "rule")
    settings = [{name: section[name] for name in names} | section["config"] for section in (saved, present)]
    if not hasattr(networks, saved["backbone"]) and is_ours(saved["backbone"]):  # before class paths were kept
        settings[1]["backbone"] = present["backbone"].rpartition(".")[2]
    free = {"dropout", "init_std", "memory_block"} | (set() if horizons_too else {"horizons", "prefix_length"})
    for known in settings:  # whether there is one, not where it began
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


def is_resumable(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint holds what training goes on from."""
    return "optimizer_states" in checkpoint


def find(given: str | Path, preferred: str = BEST) -> Path:
    """Checkpoint file of a run folder, or the file itself; the folder of an exported model, fetched if it must be.

    Raises:
        UserError: there is none.
    """
    if str(given).startswith(exported.HUB):
        return exported.fetch(str(given))
    path = Path(given).expanduser()
    if path.is_dir() and exported.is_exported(path):
        return path
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"checkpoint {given}: no such run folder or file")
    names = (preferred, LAST) if preferred == BEST else (preferred,)
    for name in names:
        if (path / name).is_file():
            return path / name
    begin = f"; begin it again with dsmr fit --name {path.name}" if preferred == LAST else ""
    raise UserError(f"run {given} holds no {preferred}; it has not saved one yet{begin}")


def run_folder(checkpoint: Path) -> Path | None:
    """Return the folder of a checkpoint's run, which holds its `config.yaml`; None if there is none.

    Lightning's own ModelCheckpoint writes to RUN/checkpoints, or to a folder of a version above that.
    """
    written = ("metrics.csv", LAST, BEST)
    for above in ("", "..", "../.."):
        folder = Path(os.path.normpath(checkpoint.parent / above))
        is_run = not above or any((folder / name).is_file() for name in written)
        if is_run and (folder / CONFIG).is_file():
            return folder
    return None


def read(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Contents of a checkpoint of ours.

    Args:
        path: the file.
        mmap: leave the tensors on the disk until they are used.

    Raises:
        UserError: it is damaged, holds code, or is not ours.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises nearly anything for a file that is not its own
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{path} is no checkpoint that can be read safely: {reason}") from error
    if not isinstance(content, dict) or SECTION not in content:
        raise UserError(f"{path} was not written by dsmr; give a run folder or one of its checkpoints")
    check_version(content[SECTION], path)
    return content


def load(given: str | Path, *, horizons: str | None = None, attention: Form = "auto") -> Loaded:
    """Network and tokenizer of a run's best checkpoint, of a checkpoint file or of an exported model.

    Args:
        given: a run folder, a file, an exported folder or a hub address of one (`hf://OWNER/NAME`).
        horizons: other horizons than the trained ones, with the same weights; None keeps those.
        attention: the form that computes it, see `dsmr.attention.attend.attend`.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    path = find(given)
    if path.is_dir():
        section, weights = exported.read_description(path)["model"], exported.read_weights(path)
        vocabulary = json.loads((path / exported.TOKENIZER).read_text(encoding="utf-8"))["vocabulary"]
    else:
        content, vocabulary = read(path), None
        section, weights = content[SECTION], backbone_weights(content)
    check_version(section, path)
    needed = [name for name in (section["backbone"], (section["tokenizer"] or {}).get("name", "")) if "." in name]
    if needed and str(given).startswith(exported.HUB):
        raise UserError(
            f"checkpoint {given} needs code that is not part of dsmr ({', '.join(needed)}), which is not imported for "
            "models from the hub; read that code, then download the model and give its folder"
        )
    network = network_of(section, path)
    config: dict[str, Any] = section["config"]
    if horizons is not None:
        if "horizons" not in config:
            raise UserError(f"{section['backbone']} has no horizons that could be changed; leave out --horizons")
        config = config | {"horizons": horizons}
    try:
        backbone = network.rebuild(config, attention=attention)
        backbone.load_state_dict(weights)
    except ValueError as error:  # raised here as well, so that one of a user's own network is told in one line
        raise UserError(str(error)) from error
    except (TypeError, RuntimeError) as error:  # a class that has changed since, where it is a user's own
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} does not fit the network {section['backbone']} as it is now ({reason}); use the version that "
            "trained it"
        ) from error
    about = section.get("data"), section.get("tokens_per_second")
    return Loaded(backbone.eval(), section["tokenizer"], path, vocabulary, *about)


def network_of(section: dict[str, Any], path: Path) -> type[Backbone]:
    """Return the network class that a checkpoint names, importing a user's module.

    Raises:
        UserError: there is no such class, or it is no network.
    """
    name: str = section["backbone"]
    network = getattr(networks, name, None)
    if isinstance(network, type) and issubclass(network, Backbone):
        return network
    name = given_in_config(name, path) if is_ours(name) else name
    if is_ours(name):
        raise UserError(f"{path}: unknown network {name!r}; update dsmr")
    network = imported(name, f"{path}: the network {name} is not part of dsmr, and")
    if not (isinstance(network, type) and issubclass(network, Backbone)):
        raise UserError(f"{path}: {name} is not a network: it does not derive from dsmr.model.Backbone")
    return network


def imported(class_path: str, what: str) -> Any:
    """Import a user's own class.

    Args:
        class_path: `mynet.Mine`.
        what: begins the message where it cannot be imported; `its module mynet cannot be used` follows.

    Raises:
        UserError: it cannot be imported.
    """
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's module raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{what} its module {module} cannot be used ({reason}); run this in the folder that has "
            f"{module.partition('.')[0]}, or put that folder on PYTHONPATH"
        ) from error


def given_in_config(name: str, path: Path) -> str:
    """Class path of a user's own network, from the settings beside a checkpoint that names only its class."""
    try:
        config = yaml.safe_load((path.parent / CONFIG).read_text(encoding="utf-8"))
        class_path = str(config["model"]["backbone"]["class_path"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return name
    return class_path if class_path.rpartition(".")[2] == name else name


def read_section(folder: Path) -> dict[str, Any] | None:
    """Read what a run kept of its network: `run.json`, or for runs of earlier versions a checkpoint; None for neither.

    Nothing is imported, and no weights are read into memory.

    Raises:
        UserError: `run.json` cannot be read.
    """
    if (folder / RUN).is_file():
        section = json.loads((folder / RUN).read_text(encoding="utf-8"))
        if not isinstance(section, dict):
            raise UserError(f"{RUN} holds no description of a run")
        return section
    for path in (folder / BEST, folder / LAST):
        if path.is_file():
            with suppress(ValueError):  # a damaged checkpoint: the run's figures are elsewhere
                section = read(path, mmap=True)[SECTION]
                return section if isinstance(section, dict) else None
    return None


def backbone_weights(content: dict[str, Any]) -> dict[str, Tensor]:
    """The network's part of a checkpoint's weights."""
    prefix = "backbone."
    return {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}


def check_version(section: dict[str, Any], path: Path) -> None:
    """Refuse what a newer version has written.

    Raises:
        UserError: the format is not known here.
    """
    written = section["format_version"]
    if written > FORMAT_VERSION:
        raise UserError(f"{path} has format {written}, this version reads up to {FORMAT_VERSION}; update dsmr")
