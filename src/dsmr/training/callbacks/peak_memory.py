"""Memory that training takes."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from dsmr.cost import GIB, MIB
from dsmr.cost.measuring import SavedBytes, peak_memory, reset_peak_memory
from dsmr.training.callbacks.throughput import is_logged
from dsmr.training.module import RecurrentLM


class PeakMemory(Callback):
    """Logs memory under names that say what is counted.

    `perf/state_mib`: the ring memories of training. On CUDA, of this process since training began:
    `perf/peak_memory_gib`, allocated by torch, and `perf/peak_reserved_gib`, reserved by its allocator. On a CPU:
    `perf/saved_mib`, saved by autograd in one step for its backward pass, and `perf/peak_rss_gib`, the largest
    resident size of the process.

    Args:
        at_batch: the batch whose saved tensors are counted.
    """

    def __init__(self, at_batch: int = 2) -> None:
        self.at_batch, self._batches = at_batch, 0
        self._saved: SavedBytes | None = None
        self._saved_mib: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the peak."""
        reset_peak_memory(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Begin to count the saved tensors of one step."""
        self._batches += 1
        assert isinstance(pl_module, RecurrentLM)
        if self._batches == self.at_batch and pl_module.device.type == "cpu":
            self._saved = SavedBytes([*pl_module.parameters(), *pl_module.memories.training_tensors()])
            self._saved.__enter__()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Count them."""
        if self._saved is not None:
            self._saved.__exit__(None, None, None)
            self._saved_mib = self._saved.total / MIB
            self._saved.release()
            self._saved = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log at the steps that loggers record."""
        if not is_logged(trainer):
            return
        assert isinstance(pl_module, RecurrentLM)
        state = sum(tensor.numel() * tensor.element_size() for tensor in pl_module.memories.training_tensors())
        metrics = {"perf/state_mib": state / MIB}
        metrics |= {f"perf/{name}": value for name, value in peak_memory(pl_module.device).items()}
        if pl_module.device.type == "cuda":
            metrics["perf/peak_reserved_gib"] = torch.cuda.max_memory_reserved(pl_module.device) / GIB
        elif self._saved_mib is not None:
            metrics["perf/saved_mib"] = self._saved_mib
        pl_module.log_dict(metrics)
