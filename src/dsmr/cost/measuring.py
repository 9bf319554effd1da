"""Measuring what a training step keeps and takes."""

import sys
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

GIB = 2**30


def peak_rss_gib() -> dict[str, float]:
    """`peak_rss_gib`, the largest resident size of this process so far; nothing where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}


class SavedBytes:
    """Within it, every storage that autograd keeps for backward is counted once.

    Args:
        outside: tensors that autograd may refer to, but that are there anyhow: parameters and state.

    Attributes:
        total: bytes so far; of storages that were let go again too.
    """

    def __init__(self, outside: list[Tensor]) -> None:
        self._outside = {tensor.untyped_storage().data_ptr() for tensor in outside}
        self._kept: dict[int, torch.UntypedStorage] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(storage.nbytes() for storage in self._kept.values())

    def __enter__(self) -> Self:
        """Begin to count."""
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting."""
        self._hooks.__exit__(kind, error, trace)

    def release(self) -> None:
        """Let the storages go; until then they are held, so that no address is counted as another's."""
        self._kept.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._outside:
            self._kept[storage.data_ptr()] = storage
        return tensor
