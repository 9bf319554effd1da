"""The optimizer and the learning-rate schedule that are used unless a config names others."""

import math
from typing import Any

import torch
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


class WarmupCosine(LambdaLR):
    """Linear warm-up, then a cosine down to a share of the peak.

    Args:
        optimizer: whose learning rates are the peaks.
        warmup_steps: optimizer steps of linear warm-up.
        total_steps: optimizer steps until the lowest rate; None means the trainer's `max_steps`.
        final_share: the lowest rate over the peak.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 1000,
        total_steps: int | None = None,
        final_share: float = 0.1,
    ) -> None:
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
