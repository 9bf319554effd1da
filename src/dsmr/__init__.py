"""Depth-Structured Music Recurrence: a recurrent Transformer for whole piano performances.

    MIDI -> data (tokenizer, token store, lanes) -> model (network and memory, over attention) -> training
    and back: generate -> tokenizer -> MIDI

The names below are what most programs need; they are imported at their first use, so that `import dsmr` is quick.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsmr.data.datamodule import MusicData as MusicData
    from dsmr.generate.generator import Generator as Generator
    from dsmr.generate.sampling import Sampling as Sampling
    from dsmr.model.perceiver import PerceiverAR as PerceiverAR
    from dsmr.model.transformer import RecurrentTransformer as RecurrentTransformer
    from dsmr.training.module import RecurrentLM as RecurrentLM

PUBLIC = {
    "Generator": "dsmr.generate.generator",
    "MusicData": "dsmr.data.datamodule",
    "PerceiverAR": "dsmr.model.perceiver",
    "RecurrentLM": "dsmr.training.module",
    "RecurrentTransformer": "dsmr.model.transformer",
    "Sampling": "dsmr.generate.sampling",
}


class UserError(ValueError):
    """A mistake of the user: the message says in one line what to do, and the command line prints nothing else."""


@contextmanager
def as_user_error(prefix: str = "") -> Iterator[None]:
    """Turn a ValueError of a library, or of a class of the user's own, into a UserError with the same message."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from error


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'dsmr' has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
