"""A model that is handed on: a folder that needs no training code, holds no code itself, and whose files are checked.

    DIR/model.safetensors   the weights
        config.json         network, horizons, tokenizer, what was measured; SHA-256 of the files that are checked
        tokenizer.json      every token's name and id
        config.yaml         all settings of the training run, without its paths
        README.md           the model card, which people may write on

`dsmr.share.export` writes it; here it is found, checked and read.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from dsmr import UserError

WEIGHTS, CONFIG, TOKENIZER, SETTINGS, CARD = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "config.yaml",
    "README.md",
)
HUB = "hf://"


def is_exported(path: Path) -> bool:
    """Whether a folder looks like an exported model."""
    return (path / WEIGHTS).is_file() or (path / CONFIG).is_file()


def sha256(path: Path) -> str:
    """Digest of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_description(folder: Path) -> dict[str, Any]:
    """`config.json` of an exported model, all of whose files are whole.

    Raises:
        UserError: a file is missing, damaged, or another one than was exported.
    """
    try:
        description: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        files = description["files"]
        names = [WEIGHTS, TOKENIZER, *files]
        for name in names:
            if name not in files or "/" in name or "\\" in name:
                raise UserError(f"{folder / CONFIG} does not say which {name} belongs to it; export the run again")
            if not (folder / name).is_file():
                raise UserError(f"{folder} is incomplete: {name} is missing; export the run again")
            if sha256(folder / name) != files[name]:
                raise UserError(
                    f"{folder / name} is damaged, or not the file that was exported: its SHA-256 is not the one in "
                    f"{CONFIG}; fetch or export it again"
                )
        assert isinstance(description["model"], dict)
    except (OSError, KeyError, TypeError, AssertionError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read ({error!r}); export the run again") from error
    return description


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of an exported model.

    Raises:
        UserError: they cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}") from error


def fetch(address: str) -> Path:
    """Local copy of an exported model of the Hugging Face hub, `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`.

    Raises:
        UserError: the address is none, or nothing can be had from there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, _, revision = address.removeprefix(HUB).partition("@")
    if name.count("/") != 1:
        raise UserError(f"checkpoint {address}: a hub address is {HUB}OWNER/NAME, or {HUB}OWNER/NAME@REVISION")
    wanted = [WEIGHTS, CONFIG, TOKENIZER, SETTINGS, CARD]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"checkpoint {address} cannot be fetched: {reason[0] if reason else repr(error)}") from error
