"""The optimizer and the learning-rate schedule that are used unless a config names others, and Muon.

Shapes: N matrices of one shape, R rows, C columns.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


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
    """torch's Muon for the layers' matrices, AdamW for embeddings and vectors, behind one list of groups.

    On CUDA the matrices of one shape take their step together, see `StackedMuon`.

    A matrix is orthogonalised as it stands, also where several projections share one. Its steps are scaled so that
    learning rate and weight decay mean what they mean to AdamW (Muon is Scalable for LLM Training, arXiv
    2502.16982). Each group is split in two by what its parameters are; a group tells which of them are embeddings by
    a list of flags, `is_embedding`, as `RecurrentLM` does.

    Args:
        params: parameter groups; a group's own `weight_decay` wins.
        lr: peak learning rate, of all groups.
        momentum: of Muon.
        betas: of AdamW's running averages.
        weight_decay: of the groups that name none.

    Raises:
        ValueError: there is no matrix.
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
        self.param_groups = [part for group in self.param_groups for part in _split(group)]
        marked = [group for group in self.param_groups if group["use_muon"]]
        others = [group for group in self.param_groups if not group["use_muon"]]
        if not marked:
            raise ValueError("no parameter is a matrix, so that there is nothing for Muon to do")
        stacks = marked[0]["params"][0].is_cuda
        self.parts: tuple[Optimizer, ...] = (
            (StackedMuon if stacks else torch.optim.Muon)(
                marked, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw"
            ),
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
        """One step of all groups; gives the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


class StackedMuon(torch.optim.Muon):
    """torch's Muon, matrices of one shape as one batch: a sixth of the operations, whose launches a GPU waits for.

    Takes and keeps what torch's takes and keeps; learning rates are always scaled as `match_rms_adamw`.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all groups."""
        assert closure is None, "it belongs to the optimizer around this one"
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in alike.items():
                updates = orthogonalised(self._averaged(parameters, group), group)
                lr = float(group["lr"])
                torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates), alpha=-0.2 * math.sqrt(max(shape)) * lr)

    def _averaged(self, parameters: list[Tensor], group: dict[str, Any]) -> Tensor:
        """Gradients of matrices of one shape, averaged over the steps with Nesterov's look ahead, (N, R, C)."""
        grads = [p.grad for p in parameters if p.grad is not None]
        for parameter, grad in zip(parameters, grads, strict=True):
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(grad)
        averages = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        return torch.stack(torch._foreach_lerp(grads, averages, group["momentum"]) if group["nesterov"] else averages)


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
    shared = {key: value for key, value in group.items() if key != "is_embedding"}
    parts = [
        (use, [p for p, matrix in zip(parameters, is_matrix, strict=True) if matrix == use]) for use in (True, False)
    ]
    return [{**shared, "params": chosen, "use_muon": use} for use, chosen in parts if chosen]


class WarmupCosine(LambdaLR):
    """Linear warm-up, then a cosine down to a share of the peak.

    Args:
        optimizer: whose learning rates are the peaks.
        warmup_steps: optimizer steps of linear warm-up.
        total_steps: optimizer steps until the lowest rate; None means the trainer's `max_steps`.
        final_share: the lowest rate over the peak.

    Raises:
        ValueError: steps or a share that no schedule has.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 1000,
        total_steps: int | None = None,
        final_share: float = 0.1,
    ) -> None:
        if warmup_steps < 0 or (total_steps is not None and total_steps < 1) or not 0 <= final_share <= 1:
            raise ValueError(
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
