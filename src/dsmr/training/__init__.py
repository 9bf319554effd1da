"""Training: `step` has the training step on one page, `module` the LightningModule around it.

`losses`, `metrics`, `scores` -> `optimizers` -> `memories`, `checkpoint` (what a resumed run restores) -> `step` ->
`module`; `callbacks` and `csv_logger` belong to a run, `lightning_internals` is all that is private to Lightning.

The names below are class paths for configs, such as `dsmr.training.Muon`; they are imported at their first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsmr.training.module import RecurrentLM as RecurrentLM
    from dsmr.training.optimizers import AdamW as AdamW
    from dsmr.training.optimizers import Muon as Muon
    from dsmr.training.optimizers import WarmupCosine as WarmupCosine

PUBLIC = {
    "AdamW": "dsmr.training.optimizers",
    "Muon": "dsmr.training.optimizers",
    "RecurrentLM": "dsmr.training.module",
    "WarmupCosine": "dsmr.training.optimizers",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'dsmr.training' has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
