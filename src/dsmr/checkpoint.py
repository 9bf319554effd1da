"""What a checkpoint says about itself, so that it alone rebuilds the network and its tokenizer.

`last.ckpt` is Lightning's whole state with the stream's place and the training memory; `best.ckpt` holds the
weights and cannot resume. Both carry a section `dsmr`: format version, the network's class name and constructor
arguments (horizons expanded, never a schedule's class), the rule, the tokenizer. Checkpoints are read with
`weights_only=True`: tensors, numbers and texts, no code.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmr import exported
from dsmr import model as networks
from dsmr.model import Backbone, format_horizons
from dsmr.model.attention import Form
from dsmr.model.horizons import MAESTRO_RATE, TokenRate

FORMAT_VERSION = 2
SECTION = "dsmr"
BEST, LAST = "best.ckpt", "last.ckpt"


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
    """Section of a checkpoint about the network, its tokenizer and what it was trained on."""
    return {
        "format_version": FORMAT_VERSION,
        "backbone": type(backbone).__name__,
        "config": backbone.config(),
        "rule": backbone.rule,
        "tokenizer": tokenizer,
        "data": data,
        "tokens_per_second": tokens_per_second,
    }


def token_rate(section: Mapping[str, Any]) -> TokenRate | None:
    """Tokens in a second of the music that a network was trained on.

    A section that does not say so, as of older versions, has MAESTRO's with `performance` tokens, and else none.
    """
    known = section.get("tokens_per_second")
    if known is not None:
        return TokenRate(known)
    return MAESTRO_RATE if (section.get("tokenizer") or {}).get("name") == "performance" else None


def rate_of_run(folder: Path) -> TokenRate | None:
    """Tokens in a second of a run's music, from one of its checkpoints; None where none can be read or says so."""
    for name in (BEST, LAST):
        try:
            content = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
            return token_rate(content[SECTION])
        except Exception:  # there is none, or torch raises nearly anything for what it cannot read
            continue
    return None


def check_same(saved: dict[str, Any], present: dict[str, Any], *, horizons_too: bool) -> None:
    """Refuse a network that is not the one that was saved; both are sections as of `describe`.

    Horizons and prefix may differ where nothing is resumed: the weights do not depend on them. The segment length
    may not, since under the `boundary` rule it is part of the function.

    Raises:
        ValueError: naming the first setting that differs, with both values.
    """
    names = ("backbone", "rule")
    settings = [{name: section[name] for name in names} | section["config"] for section in (saved, present)]
    free = {"dropout", "init_std", "memory_block"} | (set() if horizons_too else {"horizons", "prefix_length"})
    for known in settings:  # whether there is one, not where it began
        known["memory_gate"] = known.get("memory_gate") is not None
    for name, first in settings[0].items():
        second = settings[1].get(name)
        if name in free or first == second:
            continue
        if name == "horizons":
            first, second = (value and format_horizons(value) for value in (first, second))
        raise ValueError(
            f"the checkpoint was trained with {name} = {first}, now it is {second}; use the run's own value, or "
            "begin a new run"
        )


def is_resumable(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint holds what training goes on from."""
    return "optimizer_states" in checkpoint


def find(given: str | Path, preferred: str = BEST) -> Path:
    """Checkpoint file of a run folder, or the file itself; the folder of an exported model, fetched if it must be.

    Raises:
        ValueError: there is none.
    """
    if str(given).startswith(exported.HUB):
        return exported.fetch(str(given))
    path = Path(given).expanduser()
    if path.is_dir() and exported.is_exported(path):
        return path
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"checkpoint {given}: no such run folder or file")
    names = (preferred, LAST) if preferred == BEST else (preferred,)
    for name in names:
        if (path / name).is_file():
            return path / name
    begin = f"; begin it again with dsmr fit --name {path.name}" if preferred == LAST else ""
    raise ValueError(f"run {given} holds no {preferred}; it has not saved one yet{begin}")


def read(path: Path) -> dict[str, Any]:
    """Contents of a checkpoint of ours.

    Raises:
        ValueError: it is damaged, holds code, or is not ours.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything for a file that is not its own
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{path} is no checkpoint that can be read safely: {reason}") from error
    if not isinstance(content, dict) or SECTION not in content:
        raise ValueError(f"{path} was not written by dsmr; give a run folder or one of its checkpoints")
    check_version(content[SECTION], path)
    return content


def load(given: str | Path, *, horizons: str | None = None, attention: Form = "auto") -> Loaded:
    """Network and tokenizer of a run's best checkpoint, of a checkpoint file or of an exported model.

    Args:
        given: a run folder, a file, an exported folder or a hub address of one (`hf://OWNER/NAME`).
        horizons: other horizons than the trained ones, with the same weights; None keeps those.
        attention: the form that computes it, see `dsmr.model.attention.attend`.

    Raises:
        ValueError: there is none, or it cannot be used.
    """
    path = find(given)
    if path.is_dir():
        section, weights = exported.read_description(path)["model"], exported.read_weights(path)
        vocabulary = json.loads((path / exported.TOKENIZER).read_text(encoding="utf-8"))["vocabulary"]
    else:
        content, vocabulary = read(path), None
        section, weights = content[SECTION], backbone_weights(content)
    check_version(section, path)
    network = getattr(networks, section["backbone"], None)
    if not (isinstance(network, type) and issubclass(network, Backbone)):
        raise ValueError(f"{path}: unknown network {section['backbone']!r}; update dsmr")
    changed = {"attention": attention} | ({} if horizons is None else {"horizons": horizons})
    backbone = network(**section["config"] | changed)
    backbone.load_state_dict(weights)
    about = section.get("data"), section.get("tokens_per_second")
    return Loaded(backbone.eval(), section["tokenizer"], path, vocabulary, *about)


def backbone_weights(content: dict[str, Any]) -> dict[str, Tensor]:
    """The network's part of a checkpoint's weights."""
    prefix = "backbone."
    return {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}


def check_version(section: dict[str, Any], path: Path) -> None:
    """Refuse what a newer version has written.

    Raises:
        ValueError: the format is not known here.
    """
    written = section["format_version"]
    if written > FORMAT_VERSION:
        raise ValueError(f"{path} has format {written}, this version reads up to {FORMAT_VERSION}; update dsmr")
