"""How much memory training takes."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from dsmr.cost import GIB, MIB
from dsmr.cost.measuring import SavedBytes, peak_memory, reset_peak_memory
from dsmr.training.callbacks.throughput import is_logged


class PeakMemory(Callback):
    """Logs memory, each figure named for what it is.

    `perf/state_mib`: the ring memories of training, in MiB. On CUDA, since training began and of this process's
    device: `perf/peak_memory_gib`, allocated by torch, and `perf/peak_reserved_gib`, what its allocator holds. On a
    CPU: `perf/saved_mib`, what autograd keeps of one step for its backward pass, and `perf/peak_rss_gib`, the largest
    resident size of the process.

    Args:
        at_batch: the batch whose kept tensors are counted.
    """

    def __init__(self, at_batch: int = 2) -> None:
        self.at_batch = at_batch
        self._batches = 0
        self._saved: SavedBytes | None = None
        self._saved_mib: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new peak."""
        reset_peak_memory(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count what one step keeps."""
        self._batches += 1
        if self._batches == self.at_batch and pl_module.device.type == "cpu":
            self._saved = SavedBytes([*pl_module.parameters(), *pl_module.training_state()])
            self._saved.__enter__()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop counting."""
        if self._saved is not None:
            self._saved.__exit__(None, None, None)
            self._saved_mib = self._saved.total / MIB
            self._saved.release()
            self._saved = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log, where a logger will be given it."""
        if not is_logged(trainer):
            return
        state = sum(tensor.numel() * tensor.element_size() for tensor in pl_module.training_state())
        metrics = {"perf/state_mib": state / MIB}
        metrics |= {f"perf/{name}": value for name, value in peak_memory(pl_module.device).items()}
        if pl_module.device.type == "cuda":
            metrics["perf/peak_reserved_gib"] = torch.cuda.max_memory_reserved(pl_module.device) / GIB
        elif self._saved_mib is not None:
            metrics["perf/saved_mib"] = self._saved_mib
        pl_module.log_dict(metrics)
