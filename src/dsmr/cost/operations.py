"""Cost of training a network: operations per token, and bytes that are kept for the backward pass.

Shapes: B lanes, T segment, M memory, S = M + T keys, E model width, E_kv key/value width, F hidden width, H heads,
V vocabulary, P prefix. Everything is arithmetic on a network's sizes, in the middle of a piece with full memories, so
the network may be on torch's meta device. `experiments/estimate` compares it with measurements.
"""

from dataclasses import dataclass

from dsmr.attention.visibility import find_rule, keys_per_query
from dsmr.model.blocks import Decoder
from dsmr.model.perceiver import PerceiverAR

FLOAT32 = 4


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token, a multiplication and an addition being two.

    Attributes:
        model: forward and backward, each product once, as for model FLOPs utilisation (arXiv 2204.02311, appendix B).
            The memory is detached, so its backward has two products instead of four.
        executed: including what an implementation of attention recomputes, or computes and masks.
    """

    model: float
    executed: float


def count_flops(network: Decoder, backend: str) -> Flops:
    """Count the operations of a training step per token; `backend` is an implementation of attention, not `auto`."""
    sizes = CostSizes.of(network)
    matrices = 2.0 * sizes.matrix_parameters + sizes.prefix_flops
    model = executed = 3 * matrices
    if network.settings.activation_checkpointing:
        executed += matrices
    again = 1 if network.settings.activation_checkpointing else 0
    for memory, own in sizes.keys_per_query:
        pair = 4.0 * sizes.width
        model += pair * (3 * own + (3 if sizes.prefix else 2) * memory)
        whole = memory + (sizes.segment_length if backend in ("reference", "materialised") else own)
        if backend == "materialised":
            executed += pair * (3 + again) * whole
        elif backend == "merged" and not sizes.prefix:
            executed += pair * ((3.5 + again) * own + (2.5 + again) * memory)
        else:
            executed += pair * (3.5 + again) * whole
    return Flops(model, executed)


def saved_bytes(network: Decoder, num_lanes: int, backend: str, itemsize: int, *, on_cpu: bool) -> int:
    """Count the bytes that autograd keeps from forward to backward, without parameters and rings.

    Args:
        network: in training, not compiled (compiled layers keep less).
        num_lanes: B.
        backend: implementation of attention, not `auto`.
        itemsize: bytes per number in the compute precision: below 4 means that autocast is on.
        on_cpu: layers use `dsmr.attention.fused`.
    """
    sizes = CostSizes.of(network)
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
        attention = _attention_bytes(sizes, num_lanes, memory, backend, itemsize)
        layers += tokens * common + attention
    outer = tokens * (norm + itemsize * width + FLOAT32 * sizes.vocab + 16 + mask)
    if network.settings.activation_checkpointing:
        layers = len(sizes.slots) * tokens * FLOAT32 * width
    prefix = num_lanes * sizes.prefix * (norm + mask + itemsize * (width + 4 * kv_width) + 8)
    weights = itemsize * sizes.matrix_parameters if cast_too else 0
    return round(layers + outer + prefix + weights)


def _attention_bytes(sizes: "CostSizes", lanes: int, memory: int, backend: str, itemsize: int) -> float:
    """Bytes that one layer's attention keeps besides queries, keys and values of the segment."""
    tokens, keys = lanes * sizes.segment_length, memory + sizes.segment_length
    result = tokens * (itemsize * sizes.width + FLOAT32 * sizes.heads)
    if backend == "materialised":
        weights = tokens * sizes.heads * keys * (FLOAT32 + (itemsize if itemsize < FLOAT32 else 0))
        return weights + 2 * itemsize * lanes * sizes.width * keys
    if backend == "reference":
        mask = tokens * keys * itemsize
        return result + 2 * itemsize * lanes * sizes.kv_width * keys + mask
    if backend == "merged" and sizes.kv_width < sizes.width:
        return result + tokens * 2 * itemsize * (sizes.width - sizes.kv_width)  # keys and values for every query head
    if backend == "flex" and memory:
        return 2 * result + tokens * FLOAT32 * (2 * sizes.width + sizes.heads)
    return result


@dataclass(frozen=True)
class CostSizes:
    """Sizes that costs depend on.

    Attributes:
        width: E.
        kv_width: E_kv.
        hidden: F.
        heads: H, of queries.
        vocab: V.
        segment_length: T.
        prefix: P; 0 unless the network is a PerceiverAR.
        dropout: True if there is any.
        matrix_parameters: of all matrices; the tied embedding counts once, for the logits.
        slots: M of each layer, bottom to top.
        keys_per_query: per layer, how many slots and how many tokens of its segment a query sees on average.
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
    def of(cls, network: Decoder) -> "CostSizes":
        """Return the sizes of a network."""
        length, num_layers = network.segment_length, len(network.blocks)
        prefix = network.prefix_length if isinstance(network, PerceiverAR) else 0
        slots = network.horizons or (prefix, *[0] * (num_layers - 1))
        rule = find_rule(network.rule)
        return cls(
            width=network.settings.d_model,
            kv_width=network.settings.kv_width,
            hidden=network.settings.mlp_width,
            heads=network.settings.num_heads,
            vocab=network.embedding.num_embeddings,
            segment_length=length,
            prefix=prefix,
            dropout=network.settings.dropout > 0,
            matrix_parameters=sum(p.numel() for p in network.parameters() if p.dim() == 2),
            slots=tuple(slots),
            keys_per_query=tuple(keys_per_query(rule, memory, length) for memory in slots),
        )

    @property
    def prefix_flops(self) -> float:
        """Operations of the Perceiver's projection of its prefix to keys and values, per token of the segment."""
        return 2.0 * self.width * 2 * self.kv_width * self.prefix / self.segment_length
