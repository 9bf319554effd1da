"""Find a saved model and load it: a run, a checkpoint file, an exported folder, or one on the Hugging Face hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmr import UserError, as_user_error
from dsmr.attention.backends import Backend
from dsmr.model import Backbone
from dsmr.model.horizons import TokenRate, token_rate
from dsmr.results.run_files import BEST_FILE, LAST_FILE, SECTION, check_format_version, read_checkpoint
from dsmr.share import exported
from dsmr.share.description import network_class


@dataclass(frozen=True)
class LoadedModel:
    """A network loaded from a checkpoint or an exported model, in evaluation mode."""

    backbone: Backbone
    tokenizer: dict[str, Any] | None  # `{"name", "config"}` as of `TokenizerSpec`; None if unknown
    path: Path  # the checkpoint file, or the folder of an exported model
    vocabulary: dict[str, int] | None = None  # ids of all tokens by name, for an exported model
    data: str | None = None  # name of the training data, such as `MAESTRO`, if known
    tokens_per_second: float | None = None  # of the training music, if known

    @property
    def rate(self) -> TokenRate | None:
        """Tokens per second of music, see `token_rate`."""
        return token_rate({"tokens_per_second": self.tokens_per_second, "tokenizer": self.tokenizer})


def find_checkpoint(given: str | Path, preferred: str = BEST_FILE) -> Path:
    """Find the checkpoint file of a run, or the folder of an exported model, downloading it if necessary.

    Given is a run folder, a checkpoint file, an exported folder or its hub address (`hf://OWNER/NAME`). In a run
    folder the `preferred` file is used; without `best.ckpt`, `last.ckpt`. UserError if there is no such checkpoint.
    """
    if str(given).startswith(exported.HUB):
        return exported.download_exported(str(given))
    path = Path(given).expanduser()
    if path.is_file() or exported.is_exported(path):
        return path
    if not path.is_dir():
        raise UserError(f"checkpoint {given}: no such run folder or file")
    names = (preferred, LAST_FILE) if preferred == BEST_FILE else (preferred,)
    for name in names:
        if (path / name).is_file():
            return path / name
    restart = f"; start it again with dsmr fit --name {path.name}" if preferred == LAST_FILE else ""
    raise UserError(f"run {given} has no {preferred}; it has not saved one yet{restart}")


def load_model(given: str | Path, *, horizons: str | None = None, attention: Backend = "auto") -> LoadedModel:
    """Load the network and tokenizer of a run's best checkpoint, a checkpoint file or an exported model.

    Other `horizons` replace the trained ones, with the same weights. UserError if there is no usable checkpoint.
    """
    path = find_checkpoint(given)
    if path.is_dir():
        section, weights = exported.read_description(path)["model"], exported.read_weights(path)
        vocabulary = json.loads((path / exported.TOKENIZER).read_text(encoding="utf-8"))["vocabulary"]
    else:
        content, vocabulary, prefix = read_checkpoint(path), None, "backbone."
        section, saved = content[SECTION], content["state_dict"]
        weights = {key.removeprefix(prefix): part for key, part in saved.items() if key.startswith(prefix)}
    check_format_version(section, path)
    config: dict[str, Any] = section["config"]
    tokenizer = section["tokenizer"] or {}
    names = section["backbone"], section["rule"], config.get("rule", ""), tokenizer.get("name", "")
    needed = list(dict.fromkeys(name for name in names if "." in name))
    if needed and str(given).startswith(exported.HUB):
        raise UserError(
            f"checkpoint {given} needs code that is not part of dsmr ({', '.join(needed)}), which is not imported for "
            "models from the hub; read that code, then download the model and give its folder"
        )
    network = network_class(section, path)
    if horizons is not None:
        if config.get("horizons") is None:
            raise UserError(f"{section['backbone']} has no horizons to change; leave out --horizons")
        config = config | {"horizons": horizons}
    try:
        with as_user_error():  # a user's network may raise any ValueError
            backbone = network.rebuild(config, attention=attention)
        backbone.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:  # a user's class that has changed since
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} does not fit the current network {section['backbone']} ({reason}); use the version that "
            "trained it"
        ) from error
    about = section.get("data"), section.get("tokens_per_second")
    return LoadedModel(backbone.eval(), section["tokenizer"], path, vocabulary, *about)
