"""The Perceiver-AR-like baseline: one cross-attention to a long prefix, then self-attention over the segment only.

Shapes: B lanes, T segment, P prefix, K key/value heads, D head width, N = P + T token ids that are kept.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from dsmr import UserError
from dsmr.attention.visibility import Past, Visibility
from dsmr.model.blocks import Decoder, KeysValues
from dsmr.model.horizons import FULL_HORIZON, MAESTRO_RATE, TokenRate
from dsmr.model.memory import Memory, Update, open_bytes, ring_bytes
from dsmr.model.rotary import Rotation

ID_BYTES = 8


class PerceiverAR(Decoder):
    """A decoder whose lowest layer attends to [prefix, segment], all others to the segment.

    After Perceiver AR (arXiv 2202.07765): our segment is its latents, our bottom block its cross-attention. The prefix
    is the last `prefix_length` token ids of the piece before the segment, embedded and projected again in every pass,
    so that gradients reach its embeddings. Queries and prefix share one norm, so the parameters are those of
    `RecurrentTransformer` of the same depth, exactly. With the same weights it also computes what horizons of
    `1xP+(L-1)x0` compute: what differs is the gradient, the work, and that the state consists of ids.

    Args:
        vocab_size: V.
        segment_length: T, tokens per lane and pass.
        prefix_length: P, tokens.
        settings: sizes (num_layers includes the cross-attention, dropout acts on the prefix too) and how to compute,
            see `dsmr.model.sizes.Settings`.

    Raises:
        UserError: sizes that do not fit together.
    """

    def __init__(
        self, vocab_size: int, segment_length: int, *, prefix_length: int = FULL_HORIZON, **settings: Any
    ) -> None:
        super().__init__(vocab_size, segment_length, **settings)
        if prefix_length < 1:
            raise UserError(f"prefix_length is {prefix_length}; it must be at least 1")
        self.prefix_length = prefix_length

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that rebuild this network."""
        return super().config() | {"prefix_length": self.prefix_length}

    def init_memory(self, num_lanes: int, *, decoding: bool = False) -> "PrefixMemory":
        """Make an empty memory; while decoding it keeps keys and values of the prefix and of the open segment."""
        return PrefixMemory(self, num_lanes, decoding=decoding)

    def forward(self, tokens_BT: Tensor, memory: Memory, is_start_B: Tensor | None = None) -> tuple[Tensor, Update]:
        """Read tokens after what `memory` holds; see `Backbone.forward`."""
        assert isinstance(memory, PrefixMemory)
        length_B = self.lengths_before(tokens_BT, memory, is_start_B)
        num_layers, num_tokens = len(self.blocks), tokens_BT.shape[1]
        pasts = [memory.read(layer) for layer in range(num_layers)]
        if not memory.open_length:
            pasts[0] = Past(*self._read_prefix(memory))
        ages_P = torch.arange(self.prefix_length, 0, -1, device=length_B.device)
        lowest, other = (
            Visibility(ages, length_B, memory.open_length, num_tokens) for ages in (ages_P, memory.ages_M(0))
        )
        clock = memory.clock + memory.open_length
        logits_BTV, new = self.run_layers(tokens_BT, clock, pasts, [lowest, *[other] * (num_layers - 1)])
        update = Update.of(new, length_B, num_tokens)
        prefix = None if memory.open_length else Past(pasts[0].key.detach(), pasts[0].value.detach())
        return logits_BTV, PrefixUpdate(**vars(update), tokens_BT=tokens_BT, prefix=prefix)

    def _read_prefix(self, memory: "PrefixMemory") -> KeysValues:
        """Return keys and values of the prefix, oldest token first, (B, K, P, D)."""
        start = memory.clock - self.prefix_length
        rotation = Rotation.at(start, self.prefix_length, self.settings.head_width, like=self.embedding.weight)
        embedded_BPE = self.dropout(self.embedding(memory.tokens_from(start, self.prefix_length)))
        block: Any = self.blocks[0]
        return block.keys_values(embedded_BPE, rotation)

    def state_bytes(self, num_lanes: int, itemsize: int, *, decoding: bool = False) -> int:
        """`8 * B * (P + T)` for the ids; decoding adds keys and values, `2 * itemsize * B * E_kv * (P + L * T)`."""
        ids = ID_BYTES * num_lanes * (self.prefix_length + self.segment_length)
        if not decoding:
            return ids
        sizes = {"num_lanes": num_lanes, "kv_width": self.settings.kv_width, "itemsize": itemsize}
        opened = open_bytes(len(self.blocks), segment_length=self.segment_length, **sizes)
        return ids + opened + ring_bytes([self.prefix_length], **sizes)

    def summary(self, rate: TokenRate | None = MAESTRO_RATE) -> str:
        """Return the length of the prefix, in tokens and in seconds of music."""
        time = "" if rate is None else f" ({rate.seconds(self.prefix_length):.0f} {rate.label})"
        return f"no horizons; a prefix of {self.prefix_length:,} token ids{time}"


@dataclass(frozen=True)
class PrefixUpdate(Update):
    """An update that also holds the ids that were read, and the prefix's keys and values.

    Attributes:
        tokens_BT: ids.
        prefix: keys and values, (B, K, P, D), which the rest of an open segment reads too; None inside of one.
    """

    tokens_BT: Tensor
    prefix: Past | None

    def first(self, count: int) -> "PrefixUpdate":
        """Return the update of a pass over the first `count` tokens only."""
        return replace(cast(PrefixUpdate, super().first(count)), tokens_BT=self.tokens_BT[:, :count])


class PrefixMemory(Memory):
    """Ids of the last P + T tokens, so that the prefix is known wherever the open segment begins.

    Args:
        network: source of sizes, device and dtype.
        num_lanes: B.
        decoding: also keep keys and values of prefix and open segment, for passes shorter than T.
    """

    def __init__(self, network: PerceiverAR, num_lanes: int, *, decoding: bool) -> None:
        device, dtype = network.embedding.weight.device, network.compute_dtype
        super().__init__(
            [0] * len(network.blocks),
            num_lanes=num_lanes,
            num_kv_heads=network.settings.kv_heads,
            head_width=network.settings.head_width,
            segment_length=network.segment_length,
            dtype=dtype,
            device=device,
            decoding=decoding,
            slots=[network.prefix_length if decoding else 0] + [0] * (len(network.blocks) - 1),
        )
        kept = network.prefix_length + network.segment_length
        self.tokens_BN = torch.zeros(num_lanes, kept, dtype=torch.long, device=device)

    @property
    def num_bytes(self) -> int:
        """Bytes of the ids, and of the keys and values that decoding keeps."""
        return super().num_bytes + self.tokens_BN.numel() * self.tokens_BN.element_size()

    def tokens_from(self, start: int, count: int) -> Tensor:
        """Return the ids that were read at clocks start .. start + count - 1, (B, count)."""
        return self.tokens_BN[:, self._slots(start, count)]

    @torch.no_grad()
    def commit(self, update: Update) -> None:
        """Write an update; ids older than prefix and segment are forgotten here."""
        assert isinstance(update, PrefixUpdate)
        start = self.clock + self.open_length
        super().commit(update)
        self.tokens_BN[:, self._slots(start, update.num_tokens)] = update.tokens_BT
        if self.open_length and update.prefix is not None:
            self.keys[0].copy_(update.prefix.key)
            self.values[0].copy_(update.prefix.value)

    def _slots(self, start: int, count: int) -> Tensor:
        return torch.arange(start, start + count, device=self.tokens_BN.device) % self.tokens_BN.shape[1]

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and lists only."""
        return super().state_dict() | {"tokens": self.tokens_BN}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy the content of a memory of the same shape.

        Raises:
            UserError: the state was saved with other lanes, another prefix or other sizes.
        """
        if self.tokens_BN.shape != state.get("tokens", torch.empty(0)).shape:
            raise UserError("saved memory does not fit: resume with the num_lanes and prefix_length of the run")
        super().load_state_dict(state)
        self.tokens_BN.copy_(state["tokens"])
