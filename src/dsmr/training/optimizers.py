"""AdamW and Muon, the learning-rate schedule, and how a step is skipped on the device.

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


def set_found_inf(optimizer: object, is_bad: Tensor | None) -> bool:
    """Let the next step change nothing if a flag on the device is set, which the host has not read; None clears it.

    Returns False if the optimizer does not obey `found_inf`; it then steps in any case.
    """
    if not (isinstance(optimizer, AdamW | Muon) and optimizer.obeys_found_inf):
        return False
    optimizer.found_inf = None if is_bad is None else is_bad.float()
    return True


class AdamW(torch.optim.AdamW):
    """torch's AdamW with the usual settings for language models, fused on CUDA.

    Args:
        params: parameter groups; a group's own `weight_decay` wins.
        lr: peak learning rate.
        betas: coefficients of the running averages.
        weight_decay: for groups without their own.
    """

    # 0-dim float; if it is 1, a fused step leaves parameters, moments and step counts unchanged
    found_inf: Tensor | None = None

    def __init__(
        self, params: Any, lr: float = 3e-4, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)
        if all(p.is_cuda for group in self.param_groups for p in group["params"]):
            # the argument `fused` would also let GradScaler unscale within the step, after the clipping
            for group in self.param_groups:
                group["fused"] = True

    @property
    def obeys_found_inf(self) -> bool:
        """True if torch steps in fused kernels; groups of an older checkpoint are not fused, and stay so."""
        return all(group.get("fused") for group in self.param_groups)


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
        weight_decay: for groups without their own.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Any,
        lr: float = 3e-4,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        rows: dict[Tensor, Sequence[int]] = {}
        for group in self.param_groups:
            rows |= zip(group["params"], group.get("rows") or (), strict="rows" in group)
        self.param_groups = [part for group in self.param_groups for part in _split(group)]
        marked, others = ([group for group in self.param_groups if group["use_muon"] == use] for use in (True, False))
        if not marked:
            raise UserError("no parameter is a matrix, so Muon has nothing to train")
        self.parts: tuple[BatchedMuon | AdamW, ...] = (
            BatchedMuon(marked, lr, weight_decay, momentum, rows=rows),
            *([AdamW(others, lr, betas, weight_decay)] if others else []),
        )
        self._share()

    def _share(self) -> None:
        """Let both optimizers work on the groups and the state of this one, which schedules and checkpoints see."""
        for part, is_marked in zip(self.parts, (True, False), strict=False):
            part.param_groups = [group for group in self.param_groups if group["use_muon"] == is_marked]
            part.state = self.state

    @property
    def obeys_found_inf(self) -> bool:
        """True if both optimizers obey it; that of the matrices always does."""
        return all(part.obeys_found_inf for part in self.parts if isinstance(part, AdamW))

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
            part.found_inf = self.found_inf
            part.step()
        return loss


class BatchedMuon(torch.optim.Muon):
    """torch's Muon with matrices of one shape in one batch, and stacked projections apart.

    Batching takes a sixth of the kernel launches. State and checkpoints are those of torch's Muon: one momentum buffer
    per parameter, whether it stacks projections or not.

    Steps are scaled as torch's `match_rms_adamw` does. `rows` has the row counts of the projections that a parameter
    stacks; a parameter that is missing is one matrix.
    """

    found_inf: Tensor | None = None

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
        assert closure is None, "the closure belongs to Muon"
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
                decay: float | Tensor = 1 - lr * group["weight_decay"]
                if self.found_inf is not None:  # x * 1 - 0 is x; a factor of 0 would not do, since NaN * 0 is NaN
                    updates_NRC = updates_NRC.where(self.found_inf == 0, 0)
                    decay = torch.where(self.found_inf == 0, decay, 1.0)
                torch._foreach_mul_(matrices, decay)
                torch._foreach_add_(matrices, list(updates_NRC), alpha=-0.2 * math.sqrt(max(shape)) * lr)

    def _averaged(self, parameters: list[Tensor], group: dict[str, Any]) -> Sequence[Tensor]:
        """Return the running averages of the gradients, with Nesterov's look-ahead."""
        if not parameters:
            return []
        grads = [p.grad for p in parameters if p.grad is not None]
        for parameter, grad in zip(parameters, grads, strict=True):
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(grad)
        averages = [self.state[p]["momentum_buffer"] for p in parameters]
        if self.found_inf is None:
            torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        else:
            after = torch._foreach_lerp(averages, grads, 1 - group["momentum"])
            for average, new in zip(averages, after, strict=True):
                average.copy_(new.where(self.found_inf == 0, average))
        return torch._foreach_lerp(grads, averages, group["momentum"]) if group["nesterov"] else averages


def orthogonalised(update_NRC: Tensor, group: dict[str, Any]) -> Tensor:
    """Return matrices with singular values near 1, by the Newton-Schulz iteration of torch's Muon in bfloat16.

    The coefficients make the quintic steep at 0, so that five steps suffice; they leave the singular values between
    about 0.7 and 1.2 rather than at 1, which does not hurt (Jordan et al., Muon, 2024). The norm divides first, since
    the iteration converges only for singular values up to 1; tall matrices are transposed for the smaller product.
    """
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
    """Split a parameter group into its matrices and everything else, leaving out empty groups."""
    parameters = group["params"]
    flags = group.get("is_embedding", [False] * len(parameters))
    is_matrix = [p.dim() == 2 and not flag for p, flag in zip(parameters, flags, strict=True)]
    shared = {key: value for key, value in group.items() if key not in ("is_embedding", "rows")}
    parts = {
        use: [p for p, matrix in zip(parameters, is_matrix, strict=True) if matrix == use] for use in (True, False)
    }
    return [{**shared, "params": members, "use_muon": use} for use, members in parts.items() if members]


class WarmupCosine(LambdaLR):
    """Linear warm-up, then a cosine down to a share of the peak learning rate.

    Args:
        optimizer: its learning rates are the peaks.
        warmup_steps: optimizer steps of linear warm-up.
        total_steps: optimizer steps until the lowest rate; None means all steps of `max_steps` or `max_epochs`.
        final_share: lowest rate, as a share of the peak.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 1000, total_steps: int | None = None, final_share: float = 0.1
    ) -> None:
        if warmup_steps < 0 or (total_steps is not None and total_steps < 1) or not 0 <= final_share <= 1:
            raise UserError(
                f"model.lr_scheduler: warmup_steps ({warmup_steps}) must be at least 0, total_steps ({total_steps}) "
                f"at least 1, and final_share ({final_share}) from 0 to 1"
            )
        self.warmup_steps, self.total_steps, self.final_share = warmup_steps, total_steps, final_share
        super().__init__(optimizer, self.share_at)

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the shape, which comes from the configuration: a resumed run can be made longer."""
        shape = ("warmup_steps", "total_steps", "final_share")
        return {name: value for name, value in super().state_dict().items() if name not in shape}

    def share_at(self, step: int) -> float:
        """Return the learning rate at an optimizer step, as a share of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_steps is None:
            return 1.0
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_share + (1 - self.final_share) * cosine
