"""One layer for one token per lane, compiled by numba; `dsmr.attention.decode` calls it.

Loops are written out: they compile and run faster than array expressions. Keys and values come as one row of numbers
each, with the strides of lanes, heads and tokens in it. Shapes as in `decode`.
"""

import os
from importlib import import_module
from typing import Any

import numpy as np
import torch

# read once, at import: idle threads of a larger pool would spin on cores that torch needs
os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))
import numba
from numba import prange

try:
    import_module("numba.np.ufunc.omppool")  # numba's other thread pools wake too slowly for calls of 0.1 ms
    numba.config.THREADING_LAYER = "omp"
    ON_ALL_CORES = True
except ImportError:
    ON_ALL_CORES = False
SETTINGS = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy", "nogil": True}


@numba.njit(inline="always", **SETTINGS)
def dot(a: Any, b: Any) -> Any:
    """`sum(a * b)`."""
    total = a.dtype.type(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@numba.njit(**SETTINGS)
def normalise(x_BE: Any, weight_E: Any, out_BE: Any) -> None:
    """RMSNorm, with torch's epsilon."""
    lanes, width = x_BE.shape
    one = x_BE.dtype.type(1)
    for b in range(lanes):
        mean = dot(x_BE[b], x_BE[b]) / x_BE.dtype.type(width)
        scale = one / np.sqrt(mean + np.finfo(x_BE.dtype).eps)
        for i in range(width):
            out_BE[b, i] = x_BE[b, i] * scale * weight_E[i]


def _compile(on_all_cores: bool) -> Any:
    @numba.njit(parallel=on_all_cores, cache=True, **SETTINGS)
    def decode_layer(
        x_BE: Any,
        attention_norm_E: Any,
        query_key_value_FE: Any,
        output_EE: Any,
        mlp_norm_E: Any,
        gate_up_FE: Any,
        down_EF: Any,
        cos_D: Any,
        sin_D: Any,
        keys: Any,
        key_strides: Any,
        values: Any,
        value_strides: Any,
        counts: Any,
        mask_BM: Any,
        out_BE: Any,
        key_BKD: Any,
        value_BKD: Any,
        parts: int,
    ) -> bool:
        lanes, width = x_BE.shape
        kv_heads, head_width = key_BKD.shape[1], key_BKD.shape[2]
        heads = width // head_width
        groups, half, one = heads // kv_heads, head_width // 2, x_BE.dtype.type(1)
        num_slots, num_past, num_hidden = counts
        normal_BE = np.empty_like(x_BE)

        # queries, keys and values of the token; rotary positions pair the two halves of a head
        normalise(x_BE, attention_norm_E, normal_BE)
        features = query_key_value_FE.shape[0]
        projected_BF = np.empty((lanes, features), x_BE.dtype)
        for part in prange(parts):
            for f in range(part * features // parts, (part + 1) * features // parts):
                for b in range(lanes):
                    projected_BF[b, f] = dot(query_key_value_FE[f], normal_BE[b])
        for b in range(lanes):
            for h in range(heads + kv_heads):
                for i in range(h * head_width, h * head_width + half):
                    low, high = projected_BF[b, i], projected_BF[b, i + half]
                    j = i - h * head_width
                    projected_BF[b, i] = low * cos_D[j] + high * sin_D[j]
                    projected_BF[b, i + half] = high * cos_D[half + j] + low * sin_D[half + j]
            for k in range(kv_heads):
                for i in range(head_width):
                    key_BKD[b, k, i] = projected_BF[b, (heads + k) * head_width + i]
                    value_BKD[b, k, i] = projected_BF[b, (heads + kv_heads + k) * head_width + i]

        # softmax over slots, open tokens and the token itself, whose score is `own`; the greatest score is subtracted
        attended_BE = np.empty_like(x_BE)
        scale = one / np.sqrt(x_BE.dtype.type(head_width))
        for row in prange(lanes * heads):
            b, h = row // heads, row % heads
            k = h // groups
            query_D = projected_BF[b, h * head_width : (h + 1) * head_width]
            weights = np.empty(num_past, x_BE.dtype)
            own = dot(query_D, key_BKD[b, k]) * scale
            greatest = own
            start = b * key_strides[0] + k * key_strides[1]
            for s in range(num_past):
                at = start + s * key_strides[2]
                weights[s] = dot(query_D, keys[at : at + head_width]) * scale
            if mask_BM.size:
                for s in range(num_slots):
                    if not mask_BM[b, s]:
                        weights[s] = -np.inf
            for s in range(num_slots, num_slots + num_hidden):
                weights[s] = -np.inf
            for s in range(num_past):
                greatest = max(greatest, weights[s])
            total = np.exp(own - greatest)
            sum_D = np.empty(head_width, x_BE.dtype)
            for i in range(head_width):
                sum_D[i] = value_BKD[b, k, i] * total
            for s in range(num_past):
                weights[s] = np.exp(weights[s] - greatest)
                total += weights[s]
            start = b * value_strides[0] + k * value_strides[1]
            for s in range(num_past):
                at = start + s * value_strides[2]
                for i in range(head_width):
                    sum_D[i] += weights[s] * values[at + i]
            for i in range(head_width):
                attended_BE[b, h * head_width + i] = sum_D[i] / total

        for part in prange(parts):
            for f in range(part * width // parts, (part + 1) * width // parts):
                for b in range(lanes):
                    out_BE[b, f] = x_BE[b, f] + dot(output_EE[f], attended_BE[b])
        # gated MLP
        normalise(out_BE, mlp_norm_E, normal_BE)
        hidden = down_EF.shape[1]
        gated_BF = np.empty((lanes, hidden), x_BE.dtype)
        for part in prange(parts):
            for f in range(part * hidden // parts, (part + 1) * hidden // parts):
                for b in range(lanes):
                    gate, up = dot(gate_up_FE[f], normal_BE[b]), dot(gate_up_FE[hidden + f], normal_BE[b])
                    gated_BF[b, f] = gate / (one + np.exp(-gate)) * up
        for part in prange(parts):
            for f in range(part * width // parts, (part + 1) * width // parts):
                for b in range(lanes):
                    out_BE[b, f] += dot(down_EF[f], gated_BF[b])
        return on_all_cores  # makes it part of the key in numba's cache

    return decode_layer


decode_layer = _compile(ON_ALL_CORES)
