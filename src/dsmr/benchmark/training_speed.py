"""Training rows: our networks and those of other packages.

Shapes: B lanes, T segment, P prefix, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dsmr.attention.backends import Backend, select_backend
from dsmr.benchmark.peers import PerceiverARPytorch, XTransformersXL
from dsmr.benchmark.settings import Workload
from dsmr.benchmark.variants import Row
from dsmr.cost import MIB
from dsmr.cost.measuring import SavedBytes
from dsmr.model.horizons import format_horizons
from dsmr.training.losses import token_nll

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
"""Largest difference of logits and gradients from the reference backend, relative to the largest value."""


@dataclass
class MeasuredRow:
    """A row that trains or decodes a fixed number of tokens per step."""

    name: str
    kind: str  # `training` or `decoding`
    tokens: int  # per step
    run_steps: Callable[[int], None]  # runs a number of steps
    facts: dict[str, Any]  # results that do not depend on time
    seconds: list[float] = field(default_factory=list)  # per step, one value per round


@dataclass
class TrainingStep:
    """The parts of a training step."""

    network: nn.Module  # its parameters are trained
    loss: Callable[[], Tensor]  # runs the forward pass
    after_backward: Callable[[], None]  # for example commits the memory
    state: Callable[[], list[Tensor]]  # the tensors kept from step to step
    lanes: int  # B
    length: int  # T


def network_step(work: Workload, row: Row, backend: Backend) -> TrainingStep:
    """Prepare a training step of one of our networks."""
    network, lanes = work.network(row, backend), work.lanes_of(row)
    memory = work.full_memory(network, lanes)
    tokens, pending = work.tokens(), []

    def loss() -> Tensor:
        drawn = tokens.draw(lanes, network.segment_length + 1)
        with work.autocast():
            logits_BTV, update = network(drawn[:, :-1], memory)
        pending.append(update)
        return token_nll(logits_BTV, drawn[:, 1:]).mean()

    def state() -> list[Tensor]:
        kept = memory.state_dict().values()
        return [t for part in kept for t in (part if isinstance(part, list) else [part]) if isinstance(t, Tensor)]

    return TrainingStep(network, loss, lambda: memory.commit(pending.pop()), state, lanes, network.segment_length)


def peer_sizes(work: Workload) -> dict[str, int]:
    """Return our sizes as constructor arguments of the peers."""
    sizes = work.like.settings.as_dict()
    return {key: sizes[key] for key in ("d_model", "num_layers", "num_heads", "hidden_width")}


def x_transformers_network(work: Workload) -> XTransformersXL:
    """Build x-transformers' network at our sizes."""
    torch.manual_seed(work.seed)
    sizes = (work.vocab_size, work.segment_length, work.prefix_length)
    return XTransformersXL(*sizes, **peer_sizes(work)).to(work.device)


def x_transformers_step(work: Workload) -> TrainingStep:
    """Prepare a training step of x-transformers with a memory of the full horizon."""
    network = x_transformers_network(work)
    memories = [network.init_memory(work.num_lanes)]
    tokens = work.tokens()

    def loss() -> Tensor:
        drawn = tokens.draw(work.num_lanes, work.segment_length + 1)
        with work.autocast():
            logits_BTV, memory = network(drawn[:, :-1], memories[-1])
        memories.append(memory)
        return token_nll(logits_BTV, drawn[:, 1:]).mean()

    def drop_oldest() -> None:
        del memories[0]

    return TrainingStep(network, loss, drop_oldest, lambda: memories[0], work.num_lanes, work.segment_length)


def perceiver_ar_pytorch_step(work: Workload) -> TrainingStep:
    """Prepare a training step of perceiver-ar-pytorch on prefix and segment."""
    torch.manual_seed(work.seed)
    network = PerceiverARPytorch(work.vocab_size, work.segment_length, work.prefix_length, **peer_sizes(work))
    network = network.to(work.device)
    tokens = work.tokens()
    prefix_BP = tokens.draw(work.num_lanes, work.prefix_length)

    def loss() -> Tensor:
        drawn = tokens.draw(work.num_lanes, work.segment_length + 1)
        with work.autocast():
            logits_BTV = network(torch.cat([prefix_BP, drawn[:, :-1]], dim=1))
        return token_nll(logits_BTV, drawn[:, 1:]).mean()

    return TrainingStep(network, loss, lambda: None, lambda: [prefix_BP], work.num_lanes, work.segment_length)


PEERS = {"x_transformers_xl": x_transformers_step, "perceiver_ar_pytorch": perceiver_ar_pytorch_step}


def peer_training_row(peer: str, name: str, work: Workload) -> MeasuredRow:
    """Prepare a training row of a peer; raises ImportError if it is not installed."""
    return _training_row(name, work, PEERS[peer](work), {})


def network_training_row(name: str, work: Workload, row: Row, backend: Backend) -> MeasuredRow:
    """Prepare a training row of one of our networks; ArithmeticError if its backend differs from the reference."""
    difference = check_backend(work, row, backend)
    attention = select_backend(backend, work.device.type)
    extra: dict[str, Any] = {"attention": attention, "difference_from_reference": difference}
    if row.horizons is not None:
        extra |= {"horizons": format_horizons(row.horizons), "budget": sum(row.horizons), "rule": row.rule}
    return _training_row(name, work, network_step(work, row, backend), extra)


def _training_row(name: str, work: Workload, step: TrainingStep, extra: dict[str, Any]) -> MeasuredRow:
    """Prepare a row of whole training steps: forward, backward, memory, AdamW."""
    optimizer = torch.optim.AdamW(step.network.parameters(), lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(work.device.type, enabled=work.precision == "16-mixed")

    def run_steps(steps: int) -> None:
        for _ in range(steps):
            loss = step.loss()
            scaler.scale(loss).backward()
            step.after_backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

    facts = {
        "precision": work.precision,
        "parameters": sum(p.numel() for p in step.network.parameters()),
        "lanes": step.lanes,
        "segment_length": step.length,
        "state_mib": sum(t.numel() * t.element_size() for t in step.state()) / MIB,
        "saved_mib": measure_saved_bytes(step) / MIB,
        **extra,
    }
    return MeasuredRow(name, "training", step.lanes * step.length, run_steps, facts)


def measure_saved_bytes(step: TrainingStep) -> int:
    """Measure the bytes that autograd saves for backward, without parameters and state."""
    with SavedBytes([*step.network.parameters(), *step.state()]) as saved:
        loss = step.loss()
    size = saved.total
    loss.backward()
    saved.release()
    step.after_backward()
    step.network.zero_grad(set_to_none=True)
    return size


def check_backend(work: Workload, row: Row, backend: Backend) -> float:
    """Return the largest difference of logits and gradients from the reference, relative to the largest value.

    A difference beyond the tolerance of the precision raises ArithmeticError.
    """
    results: list[list[Tensor]] = []
    lanes = work.lanes_of(row)
    for each in (backend, "reference"):
        network = work.network(row, each)
        memory = work.full_memory(work.network(row, "reference"), lanes)
        with work.autocast():
            logits_BTV, _ = network(work.tokens().draw(lanes, network.segment_length), memory)
        logits_BTV.float().square().mean().backward()
        results.append([logits_BTV.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    worst = max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-12))
        for a, b in zip(*results, strict=True)
    )
    if not worst <= TOLERANCE[work.dtype]:
        spelling = format_horizons(row.horizons) if row.horizons else "the Perceiver"
        raise ArithmeticError(
            f"{backend} differs from the reference backend by {worst:.2e} at {spelling}: do not use it"
        )
    return worst
