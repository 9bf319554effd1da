"""The optimizer and the learning-rate schedule that are used unless a config names others, and Muon.

Shapes: N matrices of one shape, R rows, C columns.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dsmr import UserError


class AdamW(torch.optim.AdamW):
    """torch's AdamW with the settings that are usual for language models.

    Args:
        params: parameter groups; a group's own `weight_decay` wins.
        lr: peak learning rate.
        betas: of the running averages.
        weight_decay: of the groups that name none.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)


class Muon(Optimizer):
    """Muon for the layers' matrices, AdamW for embeddings and vectors, behind one list of parameter groups.

    Each projection is orthogonalised by itself, also where several share one parameter for speed (query, key and
    value; gate and up): as one matrix they learned more slowly (experiments/LOG.md). Steps are scaled so that learning
    rate and weight decay mean what they mean to AdamW (Muon is Scalable for LLM Training, arXiv 2502.16982).

    A group may describe its parameters by two lists, as `RecurrentLM` does: `is_embedding`, and `rows`, the row counts
    of the projections that a parameter stacks.

    Args:
        params: parameter groups; a group's own `weight_decay` wins.
        lr: peak learning rate, of all groups.
        momentum: of Muon.
        betas: of AdamW's running averages.
        weight_decay: of the groups that name none.

    Raises:
        UserError: there is no matrix.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 3e-4,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        rows = {
            parameter: counts
            for group in self.param_groups
            for parameter, counts in zip(group["params"], group.get("rows") or (), strict="rows" in group)
        }
        self.param_groups = [part for group in self.param_groups for part in _split(group)]
        marked = [group for group in self.param_groups if group["use_muon"]]
        others = [group for group in self.param_groups if not group["use_muon"]]
        if not marked:
            raise UserError("no parameter is a matrix, so that there is nothing for Muon to do")
        self.parts: tuple[Optimizer, ...] = (
            BatchedMuon(marked, lr, weight_decay, momentum, rows=rows),
            *([torch.optim.AdamW(others, lr, betas, weight_decay=weight_decay)] if others else []),
        )
        self._share()

    def _share(self) -> None:
        """The two optimizers work on this one's groups and state, which schedules and checkpoints see."""
        for part, is_marked in zip(self.parts, (True, False), strict=False):
            part.param_groups = [group for group in self.param_groups if group["use_muon"] == is_marked]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state, as `torch.optim.Optimizer` does."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step of all groups and return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


class BatchedMuon(torch.optim.Muon):
    """torch's Muon with matrices of one shape as one batch, and stacked projections apart.

    Batching takes a sixth of the operations, whose launches a GPU waits for. State and checkpoints are those of
    torch's Muon: one momentum buffer per parameter, which stacking does not change.

    Args:
        params: parameters or groups of them, matrices.
        lr: learning rate; each step is scaled as torch's `match_rms_adamw` does.
        weight_decay: decoupled.
        momentum: of the gradient's running average.
        rows: row counts of the projections that a parameter stacks; a parameter that is missing is one matrix.

    Raises:
        UserError: the rows of a parameter do not add up to its height.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        rows: Mapping[Tensor, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(params, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")
        self._rows = {parameter: list(counts) for parameter, counts in (rows or {}).items()}
        for parameter, counts in self._rows.items():
            if sum(counts) != len(parameter):
                raise UserError(f"rows {counts} of a stacked matrix do not add up to its height, {len(parameter)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step of all groups."""
        assert closure is None, "it belongs to the optimizer around this one"
        for group in self.param_groups:
            lr = float(group["lr"])
            parameters = [p for p in group["params"] if p.grad is not None]
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter, update in zip(parameters, self._averaged(parameters, group), strict=True):
                counts = self._rows.get(parameter, [len(parameter)])
                for matrix, part in zip(parameter.split(counts), update.split(counts), strict=True):
                    alike.setdefault(matrix.shape, []).append((matrix, part))
            for shape, pairs in alike.items():
                matrices = [matrix for matrix, _ in pairs]  # views: writing to them writes to the parameters
                updates_NRC = orthogonalised(torch.stack([part for _, part in pairs]), group)
                torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
                torch._foreach_add_(matrices, list(updates_NRC), alpha=-0.2 * math.sqrt(max(shape)) * lr)

    def _averaged(self, parameters: list[Tensor], group: dict[str, Any]) -> Sequence[Tensor]:
        """Average the gradients over the steps, with Nesterov's look ahead."""
        if not parameters:
            return []
        grads = [p.grad for p in parameters if p.grad is not None]
        for parameter, grad in zip(parameters, grads, strict=True):
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(grad)
        averages = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        return torch._foreach_lerp(grads, averages, group["momentum"]) if group["nesterov"] else averages


def orthogonalised(update_NRC: Tensor, group: dict[str, Any]) -> Tensor:
    """Each matrix with its singular values near 1, by the Newton-Schulz iteration of torch's Muon in bfloat16."""
    a, b, c = group["ns_coefficients"]
    is_tall = update_NRC.shape[1] > update_NRC.shape[2]
    x_NRC = (update_NRC.mT if is_tall else update_NRC).bfloat16()
    x_NRC = x_NRC / x_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram_NRR = x_NRC @ x_NRC.mT
        gram_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, gram_NRR, x_NRC, beta=a)
    return (x_NRC.mT if is_tall else x_NRC).to(update_NRC.dtype)


def _split(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A parameter group as the group of its matrices and the group of all else, where there are any."""
    parameters = group["params"]
    flags = group.get("is_embedding", [False] * len(parameters))
    is_matrix = [p.dim() == 2 and not flag for p, flag in zip(parameters, flags, strict=True)]
    shared = {key: value for key, value in group.items() if key not in ("is_embedding", "rows")}
    parts = [
        (use, [p for p, matrix in zip(parameters, is_matrix, strict=True) if matrix == use]) for use in (True, False)
    ]
    return [{**shared, "params": chosen, "use_muon": use} for use, chosen in parts if chosen]


class WarmupCosine(LambdaLR):
    """Linear warm-up, then a cosine down to a share of the peak.

    Args:
        optimizer: whose learning rates are the peaks.
        warmup_steps: optimizer steps of linear warm-up.
        total_steps: optimizer steps until the lowest rate; None means all steps of `max_steps` or `max_epochs`.
        final_share: the lowest rate over the peak.

    Raises:
        UserError: invalid steps or final_share.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 1000,
        total_steps: int | None = None,
        final_share: float = 0.1,
    ) -> None:
        if warmup_steps < 0 or (total_steps is not None and total_steps < 1) or not 0 <= final_share <= 1:
            raise UserError(
                f"model.lr_scheduler: warmup_steps ({warmup_steps}) must be at least 0, total_steps ({total_steps}) "
                f"at least 1, and final_share ({final_share}) from 0 to 1"
            )
        self.warmup_steps, self.total_steps, self.final_share = warmup_steps, total_steps, final_share
        super().__init__(optimizer, self.share_at)

    def state_dict(self) -> dict[str, Any]:
        """State of the schedule; its shape stays a matter of configuration, so that a run can be made longer."""
        shape = ("warmup_steps", "total_steps", "final_share")
        return {name: value for name, value in super().state_dict().items() if name not in shape}

    def share_at(self, step: int) -> float:
        """Learning rate at an optimizer step, over its peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_steps is None:
            return 1.0
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_share + (1 - self.final_share) * cosine
