"""Rows of training: ours and peers'.

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
"""Largest difference of logits and gradients from the reference form, relative to the largest value."""


@dataclass
class Contestant:
    """A row: something that trains or decodes a fixed number of tokens in a step.

    Attributes:
        name: of the row.
        kind: `training` or `decoding`.
        tokens: that a step reads.
        turn: does so many steps.
        facts: figures that do not depend on time.
        seconds: per step, one for each turn.
    """

    name: str
    kind: str
    tokens: int
    turn: Callable[[int], None]
    facts: dict[str, Any]
    seconds: list[float] = field(default_factory=list)


@dataclass
class Step:
    """One training step, in parts.

    Attributes:
        network: whose parameters it trains.
        loss: forward pass and loss.
        after: what follows backward, such as writing the memory.
        state: tensors that stay from step to step.
        lanes: B.
        length: T.
    """

    network: nn.Module
    loss: Callable[[], Tensor]
    after: Callable[[], None]
    state: Callable[[], list[Tensor]]
    lanes: int
    length: int


def our_step(work: Workload, row: Row, form: Backend) -> Step:
    """A training step of one of our networks."""
    network, lanes = work.network(row, form), work.lanes_of(row)
    memory = work.filled(network, lanes)
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

    return Step(network, loss, lambda: memory.commit(pending.pop()), state, lanes, network.segment_length)


def peer_sizes(work: Workload) -> dict[str, int]:
    """Our sizes, with the width of our gated MLP."""
    sizes = work.like.settings.as_dict()
    return {key: sizes[key] for key in ("d_model", "num_layers", "num_heads", "hidden_width")}


def x_transformers_network(work: Workload) -> XTransformersXL:
    """x-transformers' network, at our sizes."""
    torch.manual_seed(work.seed)
    made = XTransformersXL(work.vocab_size, work.segment_length, work.prefix_length, **peer_sizes(work))
    return made.to(work.place)


def x_transformers_step(work: Workload) -> Step:
    """A training step of x-transformers with a memory of the full horizon."""
    network = x_transformers_network(work)
    held = [network.init_memory(work.num_lanes)]
    tokens = work.tokens()

    def loss() -> Tensor:
        drawn = tokens.draw(work.num_lanes, work.segment_length + 1)
        with work.autocast():
            logits_BTV, memory = network(drawn[:, :-1], held[-1])
        held.append(memory)
        return token_nll(logits_BTV, drawn[:, 1:]).mean()

    return Step(network, loss, lambda: held.__delitem__(0), lambda: held[0], work.num_lanes, work.segment_length)


def perceiver_ar_pytorch_step(work: Workload) -> Step:
    """A training step of perceiver-ar-pytorch on prefix and segment."""
    torch.manual_seed(work.seed)
    network = PerceiverARPytorch(work.vocab_size, work.segment_length, work.prefix_length, **peer_sizes(work))
    network = network.to(work.place)
    tokens = work.tokens()
    kept_BP = tokens.draw(work.num_lanes, work.prefix_length)

    def loss() -> Tensor:
        drawn = tokens.draw(work.num_lanes, work.segment_length + 1)
        with work.autocast():
            logits_BTV = network(torch.cat([kept_BP, drawn[:, :-1]], dim=1))
        return token_nll(logits_BTV, drawn[:, 1:]).mean()

    return Step(network, loss, lambda: None, lambda: [kept_BP], work.num_lanes, work.segment_length)


PEERS = {"x_transformers_xl": x_transformers_step, "perceiver_ar_pytorch": perceiver_ar_pytorch_step}


def peer_training(peer: str, name: str, work: Workload) -> Contestant:
    """A row of a peer.

    Raises:
        ImportError: it is not installed.
    """
    return training(name, work, PEERS[peer](work), {})


def our_training(name: str, work: Workload, row: Row, form: Backend) -> Contestant:
    """A row of one of our networks, once its form has been held against the reference."""
    difference = check_form(work, row, form)
    extra: dict[str, Any] = {
        "attention": select_backend(form, work.place.type),
        "difference_from_reference": difference,
    }
    if row.horizons is not None:
        extra |= {"horizons": format_horizons(row.horizons), "budget": sum(row.horizons), "rule": row.rule}
    return training(name, work, our_step(work, row, form), extra)


def training(name: str, work: Workload, step: Step, extra: dict[str, Any]) -> Contestant:
    """A row of training steps: forward, backward, writing the memory, AdamW."""
    optimizer = torch.optim.AdamW(step.network.parameters(), lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(work.place.type, enabled=work.precision == "16-mixed")

    def turn(steps: int) -> None:
        for _ in range(steps):
            loss = step.loss()
            scaler.scale(loss).backward()
            step.after()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

    facts = {
        "precision": work.precision,
        "parameters": sum(p.numel() for p in step.network.parameters()),
        "lanes": step.lanes,
        "segment_length": step.length,
        "state_mib": sum(t.numel() * t.element_size() for t in step.state()) / MIB,
        "saved_mib": saved_bytes(step) / MIB,
        **extra,
    }
    return Contestant(name, "training", step.lanes * step.length, turn, facts)


def saved_bytes(step: Step) -> int:
    """Bytes that autograd keeps for backward, but for parameters and state, every storage counted once."""
    with SavedBytes([*step.network.parameters(), *step.state()]) as kept:
        loss = step.loss()
    size = kept.total
    loss.backward()
    kept.release()
    step.after()
    step.network.zero_grad(set_to_none=True)
    return size


def check_form(work: Workload, row: Row, form: Backend) -> float:
    """Largest difference of logits and gradients from the reference form, relative to the largest value.

    Raises:
        ArithmeticError: it is above the bound of the precision.
    """
    found: list[list[Tensor]] = []
    lanes = work.lanes_of(row)
    for each in (form, "reference"):
        network = work.network(row, each)
        memory = work.filled(work.network(row, "reference"), lanes)
        tokens_BT = work.tokens().draw(lanes, network.segment_length)
        with work.autocast():
            logits_BTV, _ = network(tokens_BT, memory)
        logits_BTV.float().square().mean().backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        found.append([logits_BTV.detach(), *gradients])
    worst = max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-12))
        for a, b in zip(*found, strict=True)
    )
    if not worst <= TOLERANCE[work.dtype]:
        spelling = format_horizons(row.horizons) if row.horizons else "the Perceiver"
        raise ArithmeticError(f"{form} differs from the reference form by {worst:.2e} at {spelling}: do not use it")
    return worst
