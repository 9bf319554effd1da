"""Attention over memory and segment: one function, and the registry of its implementations.

Shapes: B lanes, T queries, H query heads, K key/value heads, D head width.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dsmr.attention.flex import flex, flex_blocks
from dsmr.attention.merged import merged
from dsmr.attention.reference import materialised, reference, single_query
from dsmr.attention.visibility import Past, Visibility

Backend = Literal["auto", "merged", "flex", "reference", "materialised"]
AttentionFunction = Callable[[Tensor, Tensor, Tensor, Past, Visibility, Tensor | None], Tensor]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    Attributes:
        function: takes the arguments of `attend`, without the backend.
        device: the only device type that it runs on, where `auto` selects it; None runs anywhere.
        is_compiled: compiled for each number of queries and keys.
    """

    function: AttentionFunction
    device: str | None = None
    is_compiled: bool = False


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(reference),
    "materialised": Implementation(materialised),
    "merged": Implementation(merged, device="cpu"),
    "flex": Implementation(flex, device="cuda", is_compiled=True),
}


def attend(
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    past: Past,
    visibility: Visibility,
    backend: Backend = "auto",
    gate_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention of a segment's queries over memory and their own segment.

    `softmax(q [k_memory, k]^T / sqrt(D)) [v_memory, v]` with the memory detached: equation 1 of Transformer-XL (arXiv
    1901.02860), with rotary positions in place of its relative ones. K may be smaller than H (grouped queries). A
    single query per lane takes `single_query` unless the reference is asked for.

    Args:
        query_BHTD: rotated queries.
        key_BKTD: rotated keys of the queries' own tokens.
        value_BKTD: their values.
        past: keys and values from before the queries.
        visibility: which keys each query may attend to.
        backend: an entry of `IMPLEMENTATIONS`; `auto` is merged on the CPU, flex on CUDA, and elsewhere the reference.
        gate_H: bias on the scores of the memory's slots, by query head.

    Returns:
        (B, H, T, D)
    """
    if visibility.num_queries == 1 and backend != "reference":
        return single_query(query_BHTD, key_BKTD, value_BKTD, past, visibility, gate_H)
    function = IMPLEMENTATIONS[select_backend(backend, query_BHTD.device.type)].function
    return function(query_BHTD, key_BKTD, value_BKTD, past, visibility, gate_H)


def prepare_visibility(visibility: Visibility, backend: Backend) -> None:
    """Compute what compiled layers will read from a visibility: inside a graph it could not be cached."""
    if visibility.num_queries > 1 and select_backend(backend, visibility.length_B.device.type) == "flex":
        visibility.derive("flex", flex_blocks)
        if not len(visibility.ages_M):  # plain SDPA
            visibility.own_mask  # noqa: B018  cached by the property


def compiles_each_length(backend: Backend, device: str) -> bool:
    """True if attention is compiled for each number of queries and keys."""
    return IMPLEMENTATIONS[select_backend(backend, device)].is_compiled


_selected: dict[tuple[Backend, str], str] = {}  # no functools.cache: compiled layers read it too


def select_backend(backend: Backend, device: str) -> str:
    """Return the implementation's name; `reference`, with one warning, where the backend does not run on a device."""
    if (backend, device) not in _selected:
        _selected[backend, device] = _select(backend, device)
    return _selected[backend, device]


def _select(backend: Backend, device: str) -> str:
    if backend == "auto":
        found = next((name for name, one in IMPLEMENTATIONS.items() if one.device == device), None)
    else:
        found = backend if IMPLEMENTATIONS[backend].device in (None, device) else None
    if found is None:
        name = "fast" if backend == "auto" else backend
        _log.warning("attention: no %s implementation on %s; the reference is used", name, device)
    return found or "reference"
