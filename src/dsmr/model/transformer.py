"""The recurrent Transformer: Transformer-XL's recurrence with a memory horizon per layer.

Shapes: B lanes, T segment, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dsmr import UserError
from dsmr.attention.visibility import Visibility, check_rule, find_rule
from dsmr.model.blocks import Decoder
from dsmr.model.horizons import MAESTRO_RATE, TokenRate, check_horizons, describe_horizons, draw_horizons
from dsmr.model.memory import Memory, Update, open_bytes, ring_bytes
from dsmr.model.schedules import Schedule, expand_horizons


class RecurrentTransformer(Decoder):
    """A decoder with one ring memory per layer.

    Our layer l is the paper's layer with a window of H_l cached states (Depth-Structured Music Recurrence, arXiv
    2602.19816). Like Transformer-XL (arXiv 1901.02860) it attends to detached states of past segments, but to the keys
    and values that were computed then, so that nothing is projected twice.

    Args:
        vocab_size: V.
        horizons: H_l in tokens, bottom to top: `2x3584+10x512`, a list, or a schedule.
        segment_length: T, tokens per lane and pass.
        rule: what a query may attend to: `boundary`, `sliding`, or the import path of a function of your own, see
            `dsmr.attention.visibility`.
        memory_block: tokens; divides T and every horizon.
        memory_gate: initial value of a learned bias of each head on its memory: 0 leaves attention as it is, -4 starts
            nearly without memory. Ours, not the paper's; None (default) for no such bias.
        settings: sizes and how to compute, see `dsmr.model.sizes.Settings`.

    Raises:
        UserError: horizons, rule or sizes that do not fit together.
    """

    def __init__(
        self,
        vocab_size: int,
        horizons: Schedule | str | Sequence[int] | None,
        segment_length: int,
        *,
        rule: str = "boundary",
        memory_block: int = 128,
        memory_gate: float | None = None,
        **settings: Any,
    ) -> None:
        if horizons is None:  # model.horizons is null on the command line
            raise UserError("RecurrentTransformer needs horizons; set model.horizons, for example to 2x3584+10x512")
        super().__init__(vocab_size, segment_length, memory_gate=memory_gate, **settings)
        self.rule, self.memory_block, self.memory_gate = rule, memory_block, memory_gate
        self.horizons = expand_horizons(horizons, self.settings.num_layers)
        check_horizons(self.horizons, segment_length, memory_block)
        check_rule(rule, self.horizons, segment_length)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that rebuild this network, horizons expanded."""
        gate = {} if self.memory_gate is None else {"memory_gate": self.memory_gate}
        own = {"horizons": list(self.horizons), "rule": self.rule, "memory_block": self.memory_block}
        return super().config() | own | gate

    def init_memory(self, num_lanes: int, *, decoding: bool = False) -> Memory:
        """Make an empty memory in the compute precision: autocast's where it is on, else the weights'."""
        return Memory(
            self.horizons,
            num_lanes=num_lanes,
            num_kv_heads=self.settings.kv_heads,
            head_width=self.settings.head_width,
            segment_length=self.segment_length,
            dtype=self.compute_dtype,
            device=self.embedding.weight.device,
            decoding=decoding,
        )

    @contextmanager
    def remembering(self, horizons: Sequence[int]) -> Iterator[None]:
        """Use other horizons inside the context; see `Backbone.remembering`."""
        own, self.horizons = self.horizons, expand_horizons(horizons, len(self.horizons))
        try:
            check_horizons(self.horizons, self.segment_length, self.memory_block)
            check_rule(self.rule, self.horizons, self.segment_length)
            yield
        finally:
            self.horizons = own

    def forward(self, tokens_BT: Tensor, memory: Memory, is_start_B: Tensor | None = None) -> tuple[Tensor, Update]:
        """Read tokens after what `memory` holds; see `Backbone.forward`."""
        length_B = self.lengths_before(tokens_BT, memory, is_start_B)
        num_tokens, rule = tokens_BT.shape[1], find_rule(self.rule)
        layer_of = {horizon: layer for layer, horizon in enumerate(self.horizons)}  # any layer with this horizon
        visibilities = {
            horizon: Visibility(memory.ages_M(layer), length_B, memory.open_length, num_tokens, rule)
            for horizon, layer in layer_of.items()
        }
        logits_BTV, new = self.run_layers(
            tokens_BT,
            memory.clock + memory.open_length,
            [memory.read(layer) for layer in range(len(self.horizons))],
            [visibilities[horizon] for horizon in self.horizons],
        )
        return logits_BTV, Update.of(new, length_B, num_tokens)

    def state_bytes(self, num_lanes: int, itemsize: int, *, decoding: bool = False) -> int:
        """`2 * itemsize * B * E_kv * sum(H_l)`; decoding adds the open segment's `2 * itemsize * B * E_kv * L * T`."""
        sizes = {"num_lanes": num_lanes, "kv_width": self.settings.kv_width, "itemsize": itemsize}
        opened = open_bytes(len(self.horizons), segment_length=self.segment_length, **sizes) if decoding else 0
        return ring_bytes(self.horizons, **sizes) + opened

    def summary(self, rate: TokenRate | None = MAESTRO_RATE) -> str:
        """Return the horizons in one line, and as a bar chart with one line per layer."""
        line, chart = describe_horizons(self.horizons, rate), draw_horizons(self.horizons, rate)
        return f"horizons {line}, rule {self.rule}\n{chart}"
