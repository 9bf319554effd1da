"""Read exported models: folders without code whose files are verified by checksums.

    DIR/model.safetensors   weights
        config.json         network, horizons, tokenizer, metrics, and the SHA-256 of the files that are verified
        tokenizer.json      name and id of every token
        config.yaml         all settings of the training run, without paths
        README.md           model card, which may be edited

`dsmr.share.export` writes them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from dsmr import UserError

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
SETTINGS = "config.yaml"
CARD = "README.md"
HUB = "hf://"


def is_exported(path: Path) -> bool:
    """Return True if a folder looks like an exported model."""
    return (path / WEIGHTS).is_file() or (path / CONFIG).is_file()


def sha256(path: Path) -> str:
    """Compute the hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_description(folder: Path) -> dict[str, Any]:
    """Read `config.json` of an exported model; raise UserError if a file is missing, damaged or another one."""
    try:
        description: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        files = description["files"]
        for name in [WEIGHTS, TOKENIZER, *files]:
            if name not in files or "/" in name or "\\" in name:
                raise UserError(f"{folder / CONFIG} does not list a valid {name}; export the run again")
            if not (folder / name).is_file():
                raise UserError(f"{folder} is incomplete: {name} is missing; export the run again")
            if sha256(folder / name) != files[name]:
                raise UserError(
                    f"{folder / name} is damaged, or not the file that was exported: its SHA-256 differs from the one "
                    f"in {CONFIG}; download or export it again"
                )
        assert isinstance(description["model"], dict)
    except (OSError, KeyError, TypeError, AssertionError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read ({error!r}); export the run again") from error
    return description


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of an exported model; raise UserError if that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}") from error


def download_exported(address: str) -> Path:
    """Download an exported model from `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`; return its local folder."""
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
