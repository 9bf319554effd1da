"""Memory: detached keys and values that every layer keeps across segments.

Each layer has a ring of M = H_l slots, allocated once. The token at clock c is in slot c mod M; one clock in tokens
is shared by all lanes. Here M = 6, T = 4, and the segment at clocks 8 .. 11 has just been read:

    clock   2   3   4   5   6   7 | 8   9  10  11        before commit, clock = 8
    age     6   5   4   3   2   1 | 0  -1  -2  -3        age 1 is the token just before the segment
            '---- in the ring ---'   '- segment -'
    slot    2   3   4   5   0   1

    slot    0   1   2   3   4   5
    before  6   7   2   3   4   5
    after   6   7   8   9  10  11                        after commit, clock = 12: 2, 3, 4, 5 are forgotten

`Memory.commit` is the only place where anything is written or forgotten: `forward` returns the keys and values of its
whole segment, and what does not fit a horizon is dropped here. (`PerceiverAR` keeps token ids, which `PrefixMemory`
commits in the same way.) A lane that begins a new piece is not zeroed: the network sets its `length_B` to 0
(`Decoder.lengths_before`), and a slot is visible only if its token belongs to the present piece, `age <= length_B`.
Training, validation and generation each hold a memory of their own.

While decoding token by token, the segment that is still open is kept behind the ring's slots, because a query sees its
own segment and the horizon before the segment's start. A full open segment is pushed into the ring at once:

    |------- M slots -------|--- T open tokens ---|      one allocation, read without a copy as [slots, open so far]

Shapes: B lanes, T segment, M memory slots, K key/value heads, D head width, L layers.
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
    """Result of a forward pass that `Memory.commit` takes; nothing has been written yet.

    Attributes:
        keys: per layer, the detached, rotated keys of all tokens of the pass, (B, K, n, D).
        values: per layer, their values.
        length_B: tokens of the lane's present piece before this segment; 0 where a piece began.
        num_tokens: n, tokens per lane.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length_B: Tensor
    num_tokens: int

    @classmethod
    def of(cls, keys_values: Sequence[tuple[Tensor, Tensor]], length_B: Tensor, num_tokens: int) -> "Update":
        """Detach what the layers have computed: gradients stop at the segment's start."""
        parts = ([pair[part] for pair in keys_values] for part in (0, 1))
        # while decoding, detaching what has no gradient would take a tenth of the time outside the layers
        keys, values = ([part.detach() if part.requires_grad else part for part in new] for new in parts)
        return cls(keys, values, length_B, num_tokens)

    def first(self, count: int) -> "Update":
        """Return the update of a pass over the first `count` tokens only: attention is causal, so it is the same."""
        keys, values = ([part[:, :, :count] for part in parts] for parts in (self.keys, self.values))
        return replace(self, keys=keys, values=values, num_tokens=count)


class Memory:
    """The ring memories of all layers.

    Args:
        horizons: H_l per layer in tokens, bottom to top.
        num_lanes: B.
        num_kv_heads: K.
        head_width: D.
        segment_length: T, tokens that are pushed into the rings at once.
        dtype: of keys and values, the compute precision.
        device: of keys and values.
        decoding: also keep the open segment, for passes shorter than T.
        slots: M per layer, where a subclass fills them itself; by default the horizons.
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
        # one allocation per layer, [slots, open segment], so that both are read without a copy
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
        """Dtype of keys and values."""
        return self.keys[0].dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values, rings and open segment; counters not included."""
        return sum(span.numel() * span.element_size() for spans in self._spans for span in spans)

    def ages_M(self, layer: int) -> Tensor:
        """Return the age of every slot's token, (M,): 1 is the token just before the segment, M the oldest."""
        horizon = self.horizons[layer]
        if horizon not in self._ages:
            slots_M = torch.arange(horizon, device=self.length_B.device)
            # the youngest token, of clock - 1, is in slot (clock - 1) % M and has age 1
            self._ages[horizon] = (self.clock - 1 - slots_M) % horizon + 1 if horizon else slots_M
        return self._ages[horizon]

    def read(self, layer: int) -> Past:
        """Return a view of one layer's keys and values: the ring's M slots, then the open tokens."""
        end = self.slots[layer] + self.open_length
        return Past(*(spans[layer][:, :, :end] for spans in self._spans))

    @torch.no_grad()
    def commit(self, update: Update) -> None:
        """Write an update; tokens that fall out of a horizon are forgotten here, and nowhere else.

        Call it when no gradient needs the old content: after the optimizer step in training (after backward
        within an accumulation), at once in validation and generation.

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
        """Close a segment: its last H_l tokens overwrite the oldest ones."""
        end = self.clock + self.segment_length
        rings = zip((*self.keys, *self.values), (*keys, *values), self.horizons * 2, strict=True)
        for ring, new, horizon in rings:
            kept = min(horizon, self.segment_length)
            if not kept:
                continue
            new = new[:, :, new.shape[2] - kept :]  # not [-kept:], which keeps everything at 0
            slot = (end - kept) % horizon
            head = min(kept, horizon - slot)
            ring[:, :, slot : slot + head] = new[:, :, :head]
            if head < kept:  # the ring's end was reached: the rest goes to its beginning
                ring[:, :, : kept - head] = new[:, :, head:]
        self.clock = end
        self._ages.clear()
        self.length_B = self.length_B + self.segment_length

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and lists only, so that `torch.load(weights_only=True)` can read it."""
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
        """Copy the content of a memory of the same shape.

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
    """Return the bytes of the rings: `2 * itemsize * B * E_kv * sum(H_l)`, with E_kv = K * D."""
    return 2 * itemsize * num_lanes * kv_width * sum(horizons)


def open_bytes(num_layers: int, *, segment_length: int, num_lanes: int, kv_width: int, itemsize: int) -> int:
    """Return the bytes that decoding adds for the open segment: `2 * itemsize * B * E_kv * L * T`."""
    return 2 * itemsize * num_lanes * kv_width * num_layers * segment_length


def map_lanes(memory: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Apply `change` to every tensor of a memory's state; the first dimension of each is the lanes."""
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
