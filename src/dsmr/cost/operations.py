"""What a network costs in training: operations per token, and bytes that are kept for the backward pass.

Shapes: B lanes, T segment, M memory, S = M + T keys, E model width, E_kv key/value width, F hidden width, H heads,
V vocabulary, P prefix. All is arithmetic on a network's sizes in the middle of a piece, memories full: the
network may lie on torch's meta device. `experiments/estimate` holds it against what was measured.
"""

from dataclasses import dataclass
from typing import cast

from dsmr.attention.attend import Form
from dsmr.model.blocks import Block, Decoder
from dsmr.model.perceiver import PerceiverAR

FLOAT32 = 4


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token, a multiplication and an addition being two.

    Attributes:
        model: of forward and backward, each product once: what shares of peak speed are quoted in (arXiv 2204.02311,
            appendix B). The memory is detached, so that its backward has two products instead of four.
        executed: with what a form of attention computes again or in vain.
    """

    model: float
    executed: float


def flops(network: Decoder, form: Form) -> Flops:
    """Operations of a training step per token."""
    sizes = Sizes.of(network)
    matrices = 2.0 * sizes.matrix_parameters + sizes.prefix_flops
    model = executed = 3 * matrices
    if network.activation_checkpointing:
        executed += matrices
    again = 1 if network.activation_checkpointing else 0
    for memory, own in sizes.keys_per_query:
        pair = 4.0 * sizes.width
        model += pair * (3 * own + (3 if sizes.prefix else 2) * memory)
        whole = memory + (sizes.segment_length if form in ("reference", "materialised") else own)
        if form == "materialised":
            executed += pair * (3 + again) * whole
        elif form == "merged" and not sizes.prefix:
            executed += pair * ((3.5 + again) * own + (2.5 + again) * memory)
        else:
            executed += pair * (3.5 + again) * whole
    return Flops(model, executed)


def saved_bytes(network: Decoder, num_lanes: int, form: Form, itemsize: int, *, on_cpu: bool) -> int:
    """Bytes that autograd keeps from forward to backward; parameters and rings are not among them.

    Args:
        network: in training, its layers not compiled (compiled ones keep less).
        num_lanes: B.
        form: of attention, not `auto`.
        itemsize: bytes of a number in the compute precision: below 4 means that autocast is on.
        on_cpu: there, layers take the forms of `dsmr.attention.fused`.
    """
    sizes = Sizes.of(network)
    tokens = num_lanes * sizes.segment_length
    cast_too = itemsize < FLOAT32
    width, kv_width, hidden = sizes.width, sizes.kv_width, sizes.hidden
    norm = FLOAT32 * (width + 1)  # its input, and a number
    rotated = itemsize * (width + kv_width) if cast_too or not on_cpu else 0  # besides what they were made of
    mlp = itemsize * (2 * hidden + hidden + (0 if on_cpu else hidden))
    mask = (FLOAT32 if on_cpu else 1) * width if sizes.dropout else 0  # of a branch
    common = 2 * norm + itemsize * (width + (width + 2 * kv_width) + width + width) + rotated + mlp + 2 * mask
    layers = 0.0
    for memory in sizes.slots:
        attention = _attention_bytes(sizes, num_lanes, memory, form, itemsize)
        layers += tokens * common + attention
    outer = tokens * (norm + itemsize * width + FLOAT32 * sizes.vocab + 16 + mask)
    if network.activation_checkpointing:
        layers = len(sizes.slots) * tokens * FLOAT32 * width
    prefix = num_lanes * sizes.prefix * (norm + mask + itemsize * (width + 4 * kv_width) + 8)
    weights = itemsize * sizes.matrix_parameters if cast_too else 0
    return round(layers + outer + prefix + weights)


def _attention_bytes(sizes: "Sizes", lanes: int, memory: int, form: Form, itemsize: int) -> float:
    """What one layer's attention keeps besides queries, keys and values of the segment."""
    tokens, keys = lanes * sizes.segment_length, memory + sizes.segment_length
    result = tokens * (itemsize * sizes.width + FLOAT32 * sizes.heads)
    if form == "materialised":
        weights = tokens * sizes.heads * keys * (FLOAT32 + (itemsize if itemsize < FLOAT32 else 0))
        return weights + 2 * itemsize * lanes * sizes.width * keys
    if form == "reference":
        mask = tokens * keys * itemsize
        return result + 2 * itemsize * lanes * sizes.kv_width * keys + mask
    if form == "merged" and sizes.kv_width < sizes.width:
        return result + tokens * 2 * itemsize * (sizes.width - sizes.kv_width)  # keys and values for every query head
    if form == "flex" and memory:
        return 2 * result + tokens * FLOAT32 * (2 * sizes.width + sizes.heads)
    return result


@dataclass(frozen=True)
class Sizes:
    """The sizes that costs depend on.

    Attributes:
        width: E.
        kv_width: E_kv.
        hidden: F.
        heads: H, of queries.
        vocab: V.
        segment_length: T.
        prefix: P, 0 but for the Perceiver.
        dropout: whether there is any.
        matrix_parameters: of all matrices; the tied embedding counts once, for the logits.
        slots: of each layer's memory, bottom to top.
        keys_per_query: how many of the memory's keys, and of its own segment's, a query sees on average.
    """

    width: int
    kv_width: int
    hidden: int
    heads: int
    vocab: int
    segment_length: int
    prefix: int
    dropout: bool
    matrix_parameters: int
    slots: tuple[int, ...]
    keys_per_query: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, network: Decoder) -> "Sizes":
        """Of a network."""
        block = cast(Block, network.blocks[0])
        length, num_layers = network.segment_length, len(network.blocks)
        prefix = network.prefix_length if isinstance(network, PerceiverAR) else 0
        slots = network.horizons or (prefix, *[0] * (num_layers - 1))
        causal = (length + 1) / 2
        seen = [(float(memory), causal) for memory in slots]
        if network.rule == "sliding":
            own = [sum(min(place + 1, h or length) for place in range(length)) / length for h in slots]
            seen = [(max(h - part, 0.0), part) for h, part in zip(slots, own, strict=True)]
        return cls(
            width=network.embedding.embedding_dim,
            kv_width=network.kv_width,
            hidden=block.down.in_features,
            heads=network.embedding.embedding_dim // network.head_width,
            vocab=network.embedding.num_embeddings,
            segment_length=length,
            prefix=prefix,
            dropout=network.dropout.p > 0,
            matrix_parameters=sum(p.numel() for p in network.parameters() if p.dim() == 2),
            slots=tuple(slots),
            keys_per_query=tuple(seen),
        )

    @property
    def prefix_flops(self) -> float:
        """Of the Perceiver's projection of its prefix to keys and values, per token of the segment."""
        return 2.0 * self.width * 2 * self.kv_width * self.prefix / self.segment_length
