"""All layers of a network for one token per lane, compiled for the CPU (numba): one call per layer.

At one token, torch's two dozen operations per layer cost as much as their arithmetic. Here every weight, key and value
is read once, at about the speed of the machine's memory. Without numba, on other devices and in other precisions, the
network's own layers are used.

Shapes: B lanes, E model width, F features, K key/value heads, D head width, M slots, N open tokens.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsmr.attention.visibility import Past, Visibility

MAX_LANES = 8  # above, torch's matrix products are faster
DTYPES = (torch.float32, torch.float64)
Layout = tuple[Any, tuple[int, ...]]
EVERYTHING = np.empty((0, 0), np.bool_)  # an empty mask: every slot is visible


@lru_cache
def decode_kernel() -> Callable[..., None] | None:
    """Return the compiled layer, or None without numba. Compiled at the first call (seconds), then cached on disk."""
    try:
        from dsmr.attention.decode_kernel import decode_layer
    except ImportError:
        return None
    kernel: Callable[..., None] = decode_layer
    return kernel


@lru_cache(maxsize=1)
def use_threads(count: int) -> int:
    """Give the kernel as many threads as torch has, and return that number."""
    import numba

    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    return count


class TokenDecoder:
    """Runs the layers of a network for one token per lane.

    Converting tensors to arrays costs more than a layer, so the arrays that share memory with the weights and with
    each layer's past are cached, and converted again when the tensors move. Copies of a network do
    not share the cache.
    """

    def __init__(self) -> None:
        self._weights: dict[int, tuple[list[int], list[Any]]] = {}
        self._layouts: dict[tuple[int, int], tuple[tuple[int, ...], Layout]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenDecoder":
        return TokenDecoder()

    def __reduce__(self) -> tuple[type["TokenDecoder"], tuple[()]]:
        return TokenDecoder, ()

    @staticmethod
    def supports(x_BE: Tensor) -> bool:
        """True for few lanes in a supported precision, with numba installed."""
        return len(x_BE) <= MAX_LANES and x_BE.dtype in DTYPES and decode_kernel() is not None

    def __call__(
        self,
        x_BE: Tensor,
        layers: Sequence[Sequence[Tensor]],
        cos_1D: Tensor,
        sin_1D: Tensor,
        pasts: Sequence[Past],
        visibilities: Sequence[Visibility],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the last layer's output (B, E), and per layer the tokens' rotated keys and values, (B, K, 1, D).

        Args:
            x_BE: embedded tokens.
            layers: weights of each layer, in the order of `decode_kernel.decode_layer`.
            cos_1D: rotary table of the tokens' position.
            sin_1D: its sines.
            pasts: keys and values of each layer.
            visibilities: of each layer.
        """
        kernel, num_threads = decode_kernel(), use_threads(torch.get_num_threads())
        assert kernel is not None
        tables = cos_1D.numpy()[0], sin_1D.numpy()[0]
        lanes, width = x_BE.shape
        x = x_BE.numpy()
        heads = np.empty((len(layers), 2, lanes, pasts[0].key.shape[1], len(tables[0])), x.dtype)
        outs = np.empty((2, lanes, width), x.dtype)  # a layer reads one and writes the other
        for layer, (weights, past, visibility) in enumerate(zip(layers, pasts, visibilities, strict=True)):
            arrays = self._arrays(layer, weights)
            stored = (*self._layout(layer, 0, past.key), *self._layout(layer, 1, past.value))
            counts, mask_BM = visibility.derive("decode", kernel_mask)
            out, (key, value) = outs[layer % 2], heads[layer]
            kernel(x, *arrays, *tables, *stored, counts, mask_BM, out, key, value, num_threads)
            x = out
        new = torch.from_numpy(heads)[:, :, :, :, None]
        return torch.from_numpy(x), [(new[layer, 0], new[layer, 1]) for layer in range(len(layers))]

    def _arrays(self, layer: int, weights: Sequence[Tensor]) -> list[Any]:
        """Return the weights as arrays."""
        addresses = [weight.data_ptr() for weight in weights]
        known = self._weights.get(layer)
        if known is None or known[0] != addresses:
            known = self._weights[layer] = (addresses, [weight.detach().numpy() for weight in weights])
        return known[1]

    def _layout(self, layer: int, which: int, part_BKSD: Tensor) -> Layout:
        """Return the storage from the first element on, flat, and the strides of lanes, heads and tokens in it."""
        if part_BKSD.stride(3) != 1:
            part_BKSD = part_BKSD.contiguous()
        strides = part_BKSD.stride()
        place = (part_BKSD.data_ptr(), *strides)
        known = self._layouts.get((layer, which))
        if known is None or known[0] != place:
            first = part_BKSD.storage_offset()
            whole = torch.empty(0, dtype=part_BKSD.dtype).set_(part_BKSD.untyped_storage()).numpy()
            known = (place, (whole[first:], strides[:3]))
            self._layouts[layer, which] = known
        return known[1]


def kernel_mask(visibility: Visibility) -> tuple[tuple[int, int, int], Any]:
    """Return a visibility as the kernel reads it: slots, all past tokens, hidden open tokens; and the slots' mask."""
    num_slots, (num_hidden,) = len(visibility.ages_M), visibility.num_hidden
    mask = visibility.memory_mask
    mask_BM = EVERYTHING if mask is None else mask.view(-1, num_slots).numpy()
    return (num_slots, num_slots + visibility.num_open, num_hidden), mask_BM
