"""Training: `step` has the training step on one page, `module` the LightningModule around it.

`losses`, `metrics`, `scores` -> `optimizers` -> `memories`, `checkpoint` (what a resumed run restores) -> `step` ->
`module`; `callbacks` and `csv_logger` belong to a run, `lightning_internals` is all that is private to Lightning.

The names below are class paths for configs, such as `dsmr.training.Muon`.
"""

from dsmr.training.module import RecurrentLM
from dsmr.training.optimizers import AdamW, Muon, WarmupCosine

__all__ = ["AdamW", "Muon", "RecurrentLM", "WarmupCosine"]
