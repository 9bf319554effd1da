"""Memory: detached keys and values that every layer keeps across segments.

Shapes: B lanes, T segment, M memory slots (M = H_l, the layer's horizon), H key/value heads, D head width,
L layers. `keys_BHMD` is a ring: the token at clock c lies in slot c mod M, so that writing T new tokens forgets
the T oldest. One clock, counted in tokens, is shared by all lanes.

`Memory.commit` is the only place where anything is written or forgotten. A lane is emptied by its validity: a
slot counts only if its token belongs to the lane's present piece (`length_B`), so nothing needs to be zeroed.

Token by token, the segment that is still open is kept behind the ring's slots, since a query sees its own segment and
the horizon before the segment's start; a full open segment is pushed into the ring at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsmr import UserError
from dsmr.attention.visibility import Past


@dataclass(frozen=True)
class Update:
    """What a forward pass leaves for `Memory.commit`: nothing has been written yet.

    Attributes:
        keys: per layer, the new detached keys (B, H, n, D), rotated; at least the last ones that the layer will keep,
            and all of them for a memory that keeps an open segment.
        values: likewise the values.
        length_B: tokens of the lane's present piece before this segment; 0 where a piece began.
        num_tokens: how many tokens per lane the pass has read.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length_B: Tensor
    num_tokens: int

    def first(self, count: int) -> "Update":
        """Give the update of a pass over the first `count` tokens only: attention is causal, so it is the same."""
        assert all(part.shape[2] == self.num_tokens for part in (*self.keys, *self.values)), "the pass kept too few"
        keys, values = ([part[:, :, :count] for part in parts] for parts in (self.keys, self.values))
        return replace(self, keys=keys, values=values, num_tokens=count)


class Memory:
    """The ring memories of all layers.

    Args:
        horizons: H_l per layer in tokens, bottom to top.
        num_lanes: B.
        num_kv_heads: H, key/value heads.
        head_width: D.
        segment_length: T, the segment that is pushed into the rings as one.
        dtype: of keys and values; the compute precision.
        device: where they lie.
        decoding: also keep the open segment, for passes shorter than T.
        slots: per layer, where they are not the horizons: a subclass fills them.
    """

    def __init__(
        self,
        horizons: Sequence[int],
        *,
        num_lanes: int,
        num_kv_heads: int,
        head_width: int,
        segment_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        decoding: bool = False,
        slots: Sequence[int] | None = None,
    ) -> None:
        self.horizons = tuple(horizons)
        self.segment_length = segment_length
        self.decoding = decoding

        room = segment_length if decoding else 0
        self.slots = tuple(self.horizons if slots is None else slots)
        shapes = [(num_lanes, num_kv_heads, slots + room, head_width) for slots in self.slots]
        self._spans = [[torch.zeros(shape, dtype=dtype, device=device) for shape in shapes] for _ in range(2)]
        self.keys, self.values = (
            [span[:, :, :slots] for span, slots in zip(spans, self.slots, strict=True)] for spans in self._spans
        )
        self.open_keys, self.open_values = (
            [span[:, :, slots:] for span, slots in zip(spans, self.slots, strict=True)] if decoding else []
            for spans in self._spans
        )
        self.length_B = torch.zeros(num_lanes, dtype=torch.long, device=device)
        self.clock = 0
        self.open_length = 0
        self._ages: dict[int, Tensor] = {}  # by horizon; they change with the clock

    @property
    def num_lanes(self) -> int:
        """B."""
        return self.length_B.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored keys and values."""
        return self.keys[0].dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values, rings and open segment; counters are not among them."""
        return sum(span.numel() * span.element_size() for spans in self._spans for span in spans)

    def ages_M(self, layer: int) -> Tensor:
        """Age of every slot's token, (M,): 1 is the token just before the segment's start, M the oldest."""
        horizon = self.horizons[layer]
        if horizon not in self._ages:
            slots_M = torch.arange(horizon, device=self.length_B.device)
            self._ages[horizon] = (self.clock - 1 - slots_M) % horizon + 1 if horizon else slots_M
        return self._ages[horizon]

    def read(self, layer: int) -> Past:
        """Keys and values of one layer where they lie: the ring's M slots, and the open tokens after them."""
        end = self.slots[layer] + self.open_length
        return Past(*(spans[layer][:, :, :end] for spans in self._spans))

    @torch.no_grad()
    def commit(self, update: Update) -> None:
        """Write an update; what falls out of a horizon is forgotten here.

        Raises:
            UserError: a pass shorter than a segment, in a memory that keeps no open segment.
        """
        self.length_B = update.length_B
        if update.num_tokens == self.segment_length:
            self._push(update.keys, update.values)
            return
        if not self.decoding:
            raise UserError(
                f"a pass of {update.num_tokens} tokens leaves a segment of {self.segment_length} open; "
                "only init_memory(..., decoding=True) keeps it"
            )
        end = self.open_length + update.num_tokens
        assert end <= self.segment_length, "a pass crosses the segment's end"
        for opened, new in zip((*self.open_keys, *self.open_values), (*update.keys, *update.values), strict=True):
            opened[:, :, self.open_length : end] = new
        self.open_length = end
        if end == self.segment_length:
            self.open_length = 0
            self._push(self.open_keys, self.open_values)

    def _push(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """Close a segment: its last H_l tokens take the slots of the oldest ones."""
        end = self.clock + self.segment_length
        rings = zip((*self.keys, *self.values), (*keys, *values), self.horizons * 2, strict=True)
        for ring, new, horizon in rings:
            kept = min(horizon, self.segment_length)
            if not kept:
                continue
            new = new[:, :, new.shape[2] - kept :]
            slot = (end - kept) % horizon
            head = min(kept, horizon - slot)
            ring[:, :, slot : slot + head] = new[:, :, :head]
            if head < kept:
                ring[:, :, : kept - head] = new[:, :, head:]
        self.clock = end
        self._ages.clear()
        self.length_B = self.length_B + self.segment_length

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and lists only, so that `torch.load(weights_only=True)` reads it."""
        return {
            "keys": self.keys,
            "values": self.values,
            "open_keys": self.open_keys,
            "open_values": self.open_values,
            "length_B": self.length_B,
            "clock": self.clock,
            "open_length": self.open_length,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the content of a memory of the same shape.

        Raises:
            UserError: the state was saved with other horizons, lanes or head sizes.
        """
        for name in ("keys", "values", "open_keys", "open_values"):
            mine, saved = getattr(self, name), state[name]
            if [tensor.shape for tensor in mine] != [tensor.shape for tensor in saved]:
                raise UserError(
                    f"saved memory ({_shape(saved)}) does not fit this one ({_shape(mine)}): resume with the "
                    "horizons, num_lanes and model size that the run was started with"
                )
            for target, source in zip(mine, saved, strict=True):
                target.copy_(source)
        self.length_B.copy_(state["length_B"])
        self._ages.clear()
        self.clock, self.open_length = int(state["clock"]), int(state["open_length"])


def ring_bytes(horizons: Sequence[int], *, num_lanes: int, kv_width: int, itemsize: int) -> int:
    """Bytes of the rings: `2 * itemsize * B * E_kv * sum(H_l)`, with E_kv = key/value heads * head width."""
    return 2 * itemsize * num_lanes * kv_width * sum(horizons)


def open_bytes(num_layers: int, *, segment_length: int, num_lanes: int, kv_width: int, itemsize: int) -> int:
    """Bytes that decoding adds for the open segment: `2 * itemsize * B * E_kv * L * T`."""
    return 2 * itemsize * num_lanes * kv_width * num_layers * segment_length


def over_lanes(memory: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A memory's state whose tensors, all of them with the lanes first, are changed."""
    changed: dict[str, Any] = {}
    for name, value in memory.items():
        if isinstance(value, Tensor):
            changed[name] = change(value)
        elif isinstance(value, list):
            changed[name] = [change(tensor) for tensor in value]
        else:
            changed[name] = value
    return changed


def _shape(tensors: list[Tensor]) -> str:
    if not tensors:
        return "no open segment"
    lanes, heads, _, width = tensors[0].shape
    return f"{lanes} lanes, {heads} heads of {width}, slots {[tensor.shape[2] for tensor in tensors]}"
