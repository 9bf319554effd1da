"""Muon and AdamW: two optimizers behind one list of parameter groups."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dsmr.training.optimizers import AdamW, BatchedMuon, Muon, WarmupCosine


def network() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"embedding": nn.Embedding(7, 6), "linear": nn.Linear(6, 6), "out": nn.Linear(6, 3)})


def groups(net: nn.ModuleDict) -> list[dict[str, Any]]:
    matrices = [net["embedding"].weight, net["linear"].weight, net["out"].weight]
    return [
        {"params": matrices, "is_embedding": [True, False, False]},
        {"params": [net["linear"].bias, net["out"].bias], "weight_decay": 0.0},
    ]


def train(net: nn.ModuleDict, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        loss = net["out"](net["linear"](net["embedding"](torch.randint(7, (5,)))).tanh()).square().sum()
        net.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_matrices_take_muons_steps_and_the_rest_adamws() -> None:
    one, two = network(), network()
    decayed, vectors = groups(two)
    embedding, *matrices = decayed["params"]
    others = [{"params": [embedding]}, vectors]
    apart = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, lr=0.02),
    ]
    train(one, [Muon(groups(one), lr=0.02)], range(4))
    train(two, apart, range(4))
    for (name, mine), other in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-3, msg=name)  # bfloat16 sums in another order
    three = network()
    train(three, [AdamW(groups(three), lr=0.02)], range(4))
    assert not torch.equal(one["linear"].weight, three["linear"].weight)


def test_a_schedule_reaches_both() -> None:
    net = network()
    optimizer = Muon(groups(net), lr=1.0)
    WarmupCosine(optimizer, warmup_steps=4, total_steps=8)
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [0.25] * 3


def test_saved_and_loaded_it_continues_alike() -> None:
    whole = network()
    train(whole, [Muon(groups(whole), lr=0.02)], range(6))
    net = network()
    first = Muon(groups(net), lr=0.02)
    train(net, [first], range(3))
    second = Muon(groups(net), lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(net, [second], range(3, 6))
    assert same(whole, net)


def test_a_step_returns_the_loss_of_its_closure() -> None:
    net = network()
    optimizer = Muon(groups(net), lr=0.02)

    def closure() -> torch.Tensor:
        loss = net["out"](net["linear"](net["embedding"](torch.arange(7)))).square().sum()
        loss.backward()
        return loss

    before = net["linear"].weight.detach().clone()
    assert optimizer.step(closure).item() > 0
    assert not torch.equal(before, net["linear"].weight)


def test_nothing_to_do_is_refused() -> None:
    net = network()
    with pytest.raises(ValueError, match=r"no parameter is a matrix"):
        Muon([{"params": [net["embedding"].weight], "is_embedding": [True]}, {"params": [net["linear"].bias]}])


def alike(mine: torch.Tensor, other: torch.Tensor, first: torch.Tensor) -> None:
    """Check that both moved to the same point, but for bfloat16 sums in another order."""
    moved = (other - first).norm()
    assert (mine - other).norm() < 0.02 * moved
    assert moved > 0.01 * first.norm()


def test_matrices_of_one_shape_take_torchs_steps_together() -> None:
    torch.manual_seed(0)
    shapes = [(24, 16), (24, 16), (16, 40), (16, 16), (16, 40)]
    one = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    two = [nn.Parameter(p.detach().clone()) for p in one]
    begun = [p.detach().clone() for p in one]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    together, plain = BatchedMuon(one, **settings), torch.optim.Muon(two, **settings, adjust_lr_fn="match_rms_adamw")
    for step in range(6):
        for mine, other in zip(one, two, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        if step == 3:  # one that got no gradient
            one[1].grad = two[1].grad = None
        together.step()
        plain.step()
    for mine, other, first in zip(one, two, begun, strict=True):
        alike(mine, other, first)
        torch.testing.assert_close(together.state[mine]["momentum_buffer"], plain.state[other]["momentum_buffer"])


def test_stacked_projections_take_the_steps_that_they_take_apart() -> None:
    torch.manual_seed(0)
    rows = [16, 8, 8]
    stacked = nn.Parameter(torch.randn(32, 16))
    apart = [nn.Parameter(part.clone()) for part in stacked.detach().split(rows)]
    as_one, begun = nn.Parameter(stacked.detach().clone()), stacked.detach().clone()
    mine = Muon([{"params": [stacked], "is_embedding": [False], "rows": [rows]}], lr=0.02)
    plain = torch.optim.Muon(apart, lr=0.02, adjust_lr_fn="match_rms_adamw")
    whole = torch.optim.Muon([as_one], lr=0.02, adjust_lr_fn="match_rms_adamw")
    scales = torch.tensor([1.0, 30.0, 0.1]).repeat_interleave(torch.tensor(rows))[:, None]
    for _ in range(4):
        stacked.grad = torch.randn(32, 16) * scales  # projections whose gradients differ in size
        as_one.grad = stacked.grad.clone()
        for part, grad in zip(apart, stacked.grad.split(rows), strict=True):
            part.grad = grad.clone()
        for optimizer in (mine, plain, whole):
            optimizer.step()
    alike(stacked.detach(), torch.cat([part.detach() for part in apart]), begun)
    assert (stacked - as_one).norm() > 0.5 * (as_one - begun).norm()  # which as one matrix they do not take


def test_rows_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows \[3, 4\] .* height, 8"):
        Muon([{"params": [nn.Parameter(torch.randn(8, 4))], "rows": [[3, 4]]}])
