"""Tokens per second, and the share of the device's peak."""

import time
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from dsmr.attention.backends import select_backend
from dsmr.batch import Segment
from dsmr.cost.devices import match_device
from dsmr.cost.operations import count_flops
from dsmr.model.blocks import Decoder

PEAKS = {"32": "float32", "bf": "bfloat16", "16": "float16"}


class Throughput(Callback):
    """Logs `perf/tokens_per_second`, of all processes.

    Waiting for data and saving count; validation, samples and warm-up do not. On a GPU of `dsmr.cost.devices` also
    `perf/peak_flops_share`: operations of the network, each counted once, over the peak of the device in this
    precision (model FLOPs utilisation, arXiv 2204.02311).

    Args:
        warmup_steps: first batches, which are not measured.
    """

    def __init__(self, warmup_steps: int = 5) -> None:
        self.warmup_steps = warmup_steps
        self._batches = self._tokens = 0
        self._began = self._held = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Segment, batch_idx: int
    ) -> None:
        """Measure from one logged step to the next."""
        self._batches += 1
        if self._batches <= self.warmup_steps:
            self._restart(pl_module)
            return
        self._tokens += batch.tokens_BT.numel() * trainer.world_size
        if is_logged(trainer):
            synchronise(pl_module)
            per_second = self._tokens / (time.perf_counter() - self._began)
            share = self._peak_share(trainer, pl_module, per_second)
            pl_module.log_dict({"perf/tokens_per_second": per_second} | share)
            self._restart(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock for something that is not training."""
        synchronise(pl_module)
        self._held = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resume the clock."""
        synchronise(pl_module)
        self._began += time.perf_counter() - self._held

    pause, resume = on_validation_start, on_validation_end

    def _restart(self, pl_module: LightningModule) -> None:
        synchronise(pl_module)
        self._began, self._tokens = time.perf_counter(), 0

    @staticmethod
    def _peak_share(trainer: Trainer, pl_module: LightningModule, per_second: float) -> dict[str, float]:
        device = pl_module.device
        known = match_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        peak = known.peak(PEAKS[str(trainer.precision)[:2]]) if known else None  # type: ignore[arg-type]
        backbone = getattr(pl_module, "backbone", None)
        if peak is None or not isinstance(backbone, Decoder):
            return {}
        needed = count_flops(backbone, select_backend(backbone.settings.attention, device.type)).model
        return {"perf/peak_flops_share": per_second * needed / (peak * trainer.world_size)}


def is_logged(trainer: Trainer) -> bool:
    """Return True if loggers record this step; at other steps nothing needs to be measured."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and trainer.global_step % every == 0


def synchronise(pl_module: LightningModule) -> None:
    """Wait until a GPU has done all its work."""
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize(pl_module.device)
