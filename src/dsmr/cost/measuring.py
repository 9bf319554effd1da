"""Measure the time and memory of a computation."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dsmr.cost import GIB


@contextmanager
def timed(device: torch.device) -> Iterator[list[float]]:
    """Yield a list that receives the seconds of the block, its GPU kernels included."""
    seconds: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    yield seconds
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds.append(time.perf_counter() - start)


def reset_peak_memory(device: torch.device) -> None:
    """Restart the peak of a CUDA device; the resident size of a process cannot be restarted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the peak in GiB, named for what it counts.

    On CUDA this is `peak_memory_gib`, allocated by torch since the last reset. Elsewhere it is `peak_rss_gib`, the
    largest resident size of the whole process so far; nothing where the system does not report it.
    """
    if device.type == "cuda":
        return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / GIB}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}


class SavedBytes:
    """Context manager that counts the storages autograd saves for backward, each once, except those `outside`."""

    def __init__(self, outside: list[Tensor]) -> None:
        self._outside = {tensor.untyped_storage().data_ptr() for tensor in outside}
        self._kept: dict[int, torch.UntypedStorage] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes saved so far, including storages that were freed again."""
        return sum(storage.nbytes() for storage in self._kept.values())

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def release(self) -> None:
        """Release the counted storages; they are held until then so that no address is reused and missed."""
        self._kept.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._outside:
            self._kept[storage.data_ptr()] = storage
        return tensor
