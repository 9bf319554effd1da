"""All layers for one token per lane, compiled for the CPU: what `Block.step` does, in one call a layer (numba).

At one token, torch's two dozen operations a layer cost as much as their arithmetic. Here every weight and every
remembered key and value is read once, at about the speed of the machine's memory. Without numba, on other devices
and in other precisions, `Block.step` is used.

Shapes: B lanes, E model width, F features, K key/value heads, D head width, M remembered slots, N open tokens.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dsmr.attention.visibility import Past, View

if TYPE_CHECKING:
    from dsmr.model.blocks import Block, Rotation

MAX_LANES = 8  # with more, products of matrices are quicker
DTYPES = (torch.float32, torch.float64)
Row = tuple[Any, tuple[int, ...]]
EVERYTHING = np.empty((0, 0), np.bool_)


@lru_cache
def kernel() -> Callable[..., None] | None:
    """The compiled layer: some seconds at the first call, then kept on the disk; None where numba is missing."""
    try:
        from dsmr.attention.decode_kernel import step
    except ImportError:
        return None
    made: Callable[..., None] = step
    return made


@lru_cache(maxsize=1)
def use_threads(count: int) -> int:
    """Let the kernel use as many threads as torch does; gives how many parts its products have."""
    import numba

    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    return count


class Stepper:
    """Runs the layers of a network; keeps the last arrays that share memory with their weights and their pasts.

    A copy of a network gets a stepper of its own.
    """

    def __init__(self) -> None:
        self._weights: dict[int, tuple[list[int], list[Any]]] = {}
        self._rows: dict[tuple[int, int], tuple[tuple[int, ...], Row]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Stepper":
        return Stepper()

    def __reduce__(self) -> tuple[type["Stepper"], tuple[()]]:
        return Stepper, ()

    @staticmethod
    def can(x_BE: Tensor) -> bool:
        """Whether such rows can be run; there is no autograd."""
        return len(x_BE) <= MAX_LANES and x_BE.dtype in DTYPES and kernel() is not None

    def __call__(
        self,
        x_BE: Tensor,
        blocks: "Sequence[Block]",
        rotation: "Rotation",
        pasts: Sequence[Past],
        views: Sequence[View],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Give the last layer's output (B, E), and per layer the tokens' rotated keys and values, (B, K, 1, D)."""
        step, num_threads = kernel(), use_threads(torch.get_num_threads())
        assert step is not None
        tables = rotation.cos_TD.numpy()[0], rotation.sin_TD.numpy()[0]
        lanes, width, head_width = *x_BE.shape, len(tables[0])
        kv_heads = pasts[0].key.shape[1]
        x = x_BE.numpy()
        heads = np.empty((len(blocks), 2, lanes, kv_heads, head_width), x.dtype)
        outs = np.empty((2, lanes, width), x.dtype)
        for layer, (block, past, view) in enumerate(zip(blocks, pasts, views, strict=True)):
            weights = self._arrays(layer, block.weights())
            places = (*self._row(layer, 0, past.key), *self._row(layer, 1, past.value))
            counts, seen_BM = view.make("step", seen)
            out = outs[layer % 2]
            step(x, *weights, *tables, *places, counts, seen_BM, out, heads[layer, 0], heads[layer, 1], num_threads)
            x = out
        new = torch.from_numpy(heads)[:, :, :, :, None]
        return torch.from_numpy(x), [(new[layer, 0], new[layer, 1]) for layer in range(len(blocks))]

    def _arrays(self, layer: int, weights: Sequence[Tensor]) -> list[Any]:
        """The weights as arrays, made anew where they lie elsewhere than before."""
        places = [weight.data_ptr() for weight in weights]
        known = self._weights.get(layer)
        if known is None or known[0] != places:
            known = self._weights[layer] = (places, [weight.detach().numpy() for weight in weights])
        return known[1]

    def _row(self, layer: int, which: int, part_BKSD: Tensor) -> Row:
        """All that lies behind the first number, in one row, and the distances of lanes, heads and tokens in it."""
        if part_BKSD.stride(3) != 1:
            part_BKSD = part_BKSD.contiguous()
        strides = part_BKSD.stride()
        place = (part_BKSD.data_ptr(), *strides)
        known = self._rows.get((layer, which))
        if known is None or known[0] != place:
            first = part_BKSD.storage_offset()
            whole = torch.empty(0, dtype=part_BKSD.dtype).set_(part_BKSD.untyped_storage()).numpy()
            known = (place, (whole[first:], strides[:3]))
            self._rows[layer, which] = known
        return known[1]


def seen(view: View) -> tuple[tuple[int, int, int, int], Any]:
    """A view in the kernel's terms: slots, all past tokens, the open tokens that are hidden; which slots are seen."""
    num_slots, num_past = len(view.ages_M), len(view.ages_M) + view.num_open
    is_cut = view.window and view.window <= view.num_open
    mask = view.memory_mask
    seen_BM = EVERYTHING if mask is None else mask.view(-1, num_slots).numpy()
    return (num_slots, num_past, num_slots, num_past + 1 - view.window if is_cut else num_slots), seen_BM
