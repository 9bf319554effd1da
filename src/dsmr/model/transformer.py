"""The recurrent Transformer: Transformer-XL's recurrence with a memory horizon per layer.

Shapes: B lanes, T segment, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from dsmr import UserError
from dsmr.attention.attend import Form
from dsmr.attention.visibility import View
from dsmr.model.blocks import Compilation, Decoder
from dsmr.model.horizons import MAESTRO_RATE, Rule, TokenRate, check_horizons, describe, picture
from dsmr.model.memory import Memory, Update, open_bytes, ring_bytes
from dsmr.model.schedules import Schedule, expand


class RecurrentTransformer(Decoder):
    """A decoder with one ring memory per layer.

    Our layer l is the paper's layer with a window of H_l cached states (Depth-Structured Music Recurrence,
    arXiv 2602.19816); like Transformer-XL (arXiv 1901.02860) it attends to detached states of past segments,
    but to the keys and values that were computed then, so that nothing is projected twice.

    Args:
        vocab_size: V.
        horizons: H_l in tokens, bottom to top, one for each layer; as a list, a text or a schedule.
        segment_length: T, tokens per lane and pass.
        rule: what a query sees: `boundary` or `sliding`, see `dsmr.attention.visibility.View`.
        d_model: see `Decoder`, as for all that follow but the last.
        num_layers: L.
        num_heads: query heads.
        num_kv_heads: key/value heads; None means as many.
        hidden_width: of the gated MLP; None means 8/3 of d_model.
        dropout: on embeddings and residual branches.
        init_std: of the weights.
        attention: the form that computes it, see `dsmr.attention.attend.attend`; all compute the same.
        activation_checkpointing: keep only the layers' inputs for backward and compute the rest again.
        compile_blocks: compile every layer (torch.compile), or all layers `together` as one graph.
        memory_block: tokens; divides T and every horizon.
        memory_gate: a learned bias of each head on all that it remembers begins here: 0 leaves attention as it is, -4
            begins nearly without memory. Ours, not the paper's; None, for no such bias, is.

    Raises:
        UserError: horizons, heads or widths that do not fit together.
    """

    def __init__(
        self,
        vocab_size: int,
        horizons: Schedule | str | Sequence[int] | None,
        segment_length: int,
        *,
        rule: Rule = "boundary",
        d_model: int = 512,
        num_layers: int = 12,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        hidden_width: int | None = None,
        dropout: float = 0.1,
        init_std: float = 0.02,
        attention: Form = "auto",
        activation_checkpointing: bool = False,
        compile_blocks: Compilation = False,
        memory_block: int = 128,
        memory_gate: float | None = None,
    ) -> None:
        super().__init__(
            vocab_size,
            segment_length,
            d_model=d_model,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            hidden_width=hidden_width,
            dropout=dropout,
            init_std=init_std,
            attention=attention,
            activation_checkpointing=activation_checkpointing,
            compile_blocks=compile_blocks,
            memory_gate=memory_gate,
        )
        if rule not in ("boundary", "sliding"):
            raise UserError(f"rule {rule!r} is not one of boundary, sliding")
        if horizons is None:
            raise UserError("RecurrentTransformer needs horizons; give model.horizons, for example 2x3584+10x512")
        self.horizons, self.rule, self.memory_block = expand(horizons, num_layers), rule, memory_block
        check_horizons(self.horizons, segment_length, memory_block)
        self._config |= {"horizons": list(self.horizons), "rule": rule, "memory_block": memory_block}
        if memory_gate is not None:
            self._config["memory_gate"] = memory_gate

    def init_memory(self, num_lanes: int, *, decoding: bool = False) -> Memory:
        """Make an empty memory in the compute precision: autocast's where it is on, else the weights'."""
        return Memory(
            self.horizons,
            num_lanes=num_lanes,
            num_kv_heads=self.num_kv_heads,
            head_width=self.head_width,
            segment_length=self.segment_length,
            dtype=self.compute_dtype,
            device=self.embedding.weight.device,
            decoding=decoding,
        )

    @contextmanager
    def remembering(self, horizons: Sequence[int]) -> Iterator[None]:
        """Other horizons, for the memories that are made and used inside; see `Backbone.remembering`."""
        own, self.horizons = self.horizons, expand(horizons, len(self.horizons))
        try:
            check_horizons(self.horizons, self.segment_length, self.memory_block)
            yield
        finally:
            self.horizons = own

    def forward(self, tokens_BT: Tensor, memory: Memory, is_start_B: Tensor | None = None) -> tuple[Tensor, Update]:
        """Read tokens after what `memory` holds; see `Backbone.forward`."""
        length_B = self.begin(tokens_BT, memory, is_start_B)
        num_tokens, layers = tokens_BT.shape[1], range(len(self.horizons))
        views = {
            horizon: View.of(memory.ages_M(layer), length_B, memory.open_length, num_tokens, self.rule)
            for horizon, layer in {horizon: layer for layer, horizon in enumerate(self.horizons)}.items()
        }
        logits_BTV, new = self.run(
            tokens_BT,
            memory.clock + memory.open_length,
            [memory.read(layer) for layer in layers],
            [views[horizon] for horizon in self.horizons],
        )
        closes = num_tokens == self.segment_length and not memory.decoding
        kept = [min(horizon, num_tokens) if closes else num_tokens for horizon in self.horizons]
        keys, values = ([last(new[layer][part], kept[layer]) for layer in layers] for part in (0, 1))
        return logits_BTV, Update(keys, values, length_B, num_tokens)

    def state_bytes(self, num_lanes: int, itemsize: int, *, decoding: bool = False) -> int:
        """`2 * itemsize * B * E_kv * sum(H_l)`; decoding adds the open segment's `2 * itemsize * B * E_kv * L * T`."""
        sizes = {"num_lanes": num_lanes, "kv_width": self.kv_width, "itemsize": itemsize}
        opened = open_bytes(len(self.horizons), segment_length=self.segment_length, **sizes) if decoding else 0
        return ring_bytes(self.horizons, **sizes) + opened

    def summary(self, rate: TokenRate | None = MAESTRO_RATE) -> str:
        """Horizons in one line, and as a picture with one line for each layer."""
        return f"horizons {describe(self.horizons, rate)}, rule {self.rule}\n{picture(self.horizons, rate)}"


def last(part_BHTD: Tensor, count: int) -> Tensor:
    """The last tokens of keys or values, detached; all of them as they are while decoding, where every call counts."""
    if part_BHTD.shape[2] == count and not part_BHTD.requires_grad:
        return part_BHTD
    return part_BHTD.detach()[:, :, part_BHTD.shape[2] - count :]
