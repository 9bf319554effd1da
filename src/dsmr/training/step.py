"""The training step on one page: everything between two batches, in the order in which it happens.

| | step | hook |
|---|---|---|
| 1 | save the RNG state | `on_train_batch_start` |
| 2 | forward: loss, and the update of the memory | `training_step` |
| 3 | backward | Lightning's |
| 4 | clip the gradients | `configure_gradient_clipping` |
| 5 | check that loss and gradient norm are finite | `configure_gradient_clipping` |
| 6 | optimizer step | Lightning's, inside `optimizer_step` |
| 7 | commit the update to the memory | `_commit`: the end of `optimizer_step`, or `on_after_backward` |
| 8 | advance the data stream | `_commit` |

Within an accumulation of gradients (`trainer.accumulate_grad_batches`), 4 and 6 are left out, and 7 and 8 follow
backward. The memory is never written before backward: autograd needs the keys and values that the forward pass read.

**A failed step changes nothing.** If the loss or the gradient norm is NaN or Inf, the step raises `NotFiniteError`,
and weights, optimizer, learning rate, memory, data stream and RNG are those before the step. Limits: within an
accumulation the earlier segments are committed already, so only weights and optimizer are kept; in float16 the
gradient scaler skips steps with non-finite gradients by itself, and only the loss is checked.

**The check does not drain the GPU's queue.** Reading the flag of 5 before 6 would, in every step. On CUDA the
optimizer step is queued first, with the flag as `found_inf`, as torch's `GradScaler` does for fused optimizers: the
kernels themselves leave weights and state unchanged. The host then reads the flag while the GPU runs the optimizer,
from a copy that waits for the norm alone. Reading it one step later would hide the rest of the wait, but by then
learning rate, memory, stream and Lightning's counters would have changed. Optimizers that do not support `found_inf`
(see `optimizers.set_found_inf`), such as all that were made on a CPU, are checked before they step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from dsmr.batch import IGNORED, Segment
from dsmr.data.datamodule import MusicData
from dsmr.model import Backbone
from dsmr.model.memory import Update
from dsmr.training.checkpoint import random_state
from dsmr.training.lightning_internals import trainer_of
from dsmr.training.losses import NotFiniteError, piece_position, token_nll
from dsmr.training.memories import SplitMemories
from dsmr.training.optimizers import set_found_inf


class HostFlag:
    """A boolean of the device, copied to the host without waiting for what is queued behind it."""

    def __init__(self, flag: Tensor) -> None:
        # only CUDA has an event to wait for; there, the copy is pinned
        self._copy = flag.to("cpu", non_blocking=flag.is_cuda)
        self._event = torch.cuda.Event() if flag.is_cuda else None
        if self._event is not None:
            self._event.record()

    def read(self) -> bool:
        """Wait for the copy, and return it."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._copy)


@dataclass(repr=False)
class PendingSegment:
    """A segment on its way from `on_train_batch_start` to `_commit`; the forward pass sets what has no default."""

    random_state: dict[str, Tensor]  # of torch's generators before the step
    has_optimizer_step: bool = False  # not within an accumulation of gradients
    is_computed: bool = False  # after the forward pass
    batch: Segment = field(init=False)
    nll_BT: Tensor = field(init=False)  # detached
    update: Update = field(init=False)
    is_loss_finite: Tensor = field(init=False)  # bool, the same on all processes


class TrainingStep(LightningModule):
    """The hooks of a training step; `RecurrentLM` adds everything else."""

    def __init__(self, backbone: Backbone, asked_weight: float) -> None:
        super().__init__()
        self.backbone, self.asked_weight = backbone, asked_weight
        self.memories = SplitMemories(backbone)
        self._pending = PendingSegment({})
        self._unread: list[tuple[PendingSegment, HostFlag]] = []
        self._is_accumulated_finite: Tensor | None = None  # of segments since the last optimizer step

    def on_fit_start(self) -> None:
        """Forget what an interrupted fit has left behind."""
        self._pending, self._unread, self._is_accumulated_finite = PendingSegment({}), [], None

    def on_train_batch_start(self, batch: Segment, batch_idx: int) -> None:
        """1. Save the RNG state so that a failed step can be rolled back."""
        self._pending = PendingSegment(random_state(self.device))

    def training_step(self, batch: Segment) -> Tensor:
        """2. Forward: mean NLL over B * T positions, a constant, so that padding changes no gradient's weight."""
        trainer = trainer_of(self)
        rank, world_size = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        memory = self.memories.get_or_init("train", len(batch.is_start_B), rank, world_size)
        logits_BTV, update = self.backbone(batch.tokens_BT, memory, batch.is_start_B)
        nll_BT = token_nll(logits_BTV, batch.targets_BT)
        totals = torch.stack([nll_BT.detach().sum(), (batch.targets_BT != IGNORED).sum()])
        if world_size > 1:
            torch.distributed.all_reduce(totals)
        self.log("train/nll", totals[0] / totals[1].clamp(min=1), prog_bar=True)
        pending = self._pending
        pending.batch, pending.update, pending.nll_BT = batch, update, nll_BT.detach()
        pending.is_loss_finite, pending.is_computed = totals[0].isfinite(), True
        extra_BT = nll_BT * (batch.distance_BT > 0)
        return (nll_BT.sum() + (self.asked_weight - 1) * extra_BT.sum()) / nll_BT.numel()

    def on_after_backward(self) -> None:
        """5, 7, 8 within an accumulation of gradients, where no optimizer step follows."""
        if not self._pending.has_optimizer_step:
            is_finite, before = self._pending.is_loss_finite, self._is_accumulated_finite
            self._is_accumulated_finite = is_finite if before is None else before & is_finite
            self._check(is_finite, is_late=is_finite.is_cuda)
            self._commit()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """4. Clip the gradients; 5. raise `NotFiniteError`, on CUDA after an optimizer step that changed nothing."""
        norm = self._clipped_norm(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.log("train/gradient_norm", norm)
        is_finite = self._pending.is_loss_finite
        if self._is_accumulated_finite is not None:  # a loss of Inf may have finite gradients
            is_finite = is_finite & self._is_accumulated_finite
        is_scaled = self.trainer.precision == "16-mixed"
        if not is_scaled:
            is_finite = is_finite & norm.isfinite()
        self._check(is_finite, is_late=not is_scaled and set_found_inf(optimizer, ~is_finite))

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """2 to 5 run in Lightning's closure, then the optimizer steps (6); 7 and 8 follow."""
        self._pending.has_optimizer_step = True
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        set_found_inf(self.optimizers(use_pl_optimizer=False), None)
        self._is_accumulated_finite = None
        self._read_flags()
        self._commit()

    def _commit(self) -> None:
        """7. Commit the update to the memory; 8. advance the data stream."""
        self.memories["train"].commit(self._pending.update)
        if self._data is not None:
            self._data.advance(self._pending.batch.step)
        del self._pending.update  # keys and values, which a segment with an unread flag would keep
        self._pending = PendingSegment({})

    def _clipped_norm(
        self, optimizer: torch.optim.Optimizer, limit: int | float | None, algorithm: str | None
    ) -> Tensor:
        """Clip the gradients, and return their norm before it."""
        if isinstance(self.trainer.strategy, FSDPStrategy):  # knows the norm over all shards
            norm: Tensor = self.trainer.model.clip_grad_norm_(limit or torch.inf)  # type: ignore[union-attr,operator]
            return norm
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if limit and algorithm == "norm":
            torch.nn.utils.clip_grads_with_norm_(parameters, float(limit), norm)
        else:
            self.clip_gradients(optimizer, limit, algorithm)
        return norm

    def _check(self, is_finite: Tensor, *, is_late: bool) -> None:
        """Raise if the pending segment failed; if `is_late`, when the optimizer step is queued."""
        self._unread.append((self._pending, HostFlag(is_finite)))
        if not is_late:
            self._read_flags()

    def _read_flags(self) -> None:
        unread, self._unread = self._unread, []
        for pending, flag in unread:
            if not flag.read():
                raise self._not_finite(pending)

    def _not_finite(self, pending: PendingSegment) -> NotFiniteError:
        """Return the error of a failed segment, which names the lanes at fault."""
        batch, is_loss_finite = pending.batch, bool(pending.is_loss_finite)
        bad_B = ~pending.nll_BT.isfinite().all(dim=1) | is_loss_finite  # a gradient may be of any lane
        lanes = zip(batch.piece_B[bad_B], batch.position_B[bad_B], strict=True)
        places = [piece_position(self._data, piece, position) for piece, position in lanes if piece >= 0]
        return NotFiniteError(
            f"{'a gradient' if is_loss_finite else 'the loss'} is not finite at step {self.trainer.global_step + 1}, "
            f"in {'; '.join(places) or 'another process'}; the weights were not changed. Lower model.optimizer.lr or "
            "trainer.gradient_clip_val, or choose another trainer.precision, and resume with dsmr fit --resume RUN",
            is_undone=self.trainer.accumulate_grad_batches == 1,
        )

    @property
    def _data(self) -> MusicData | None:
        return getattr(trainer_of(self), "datamodule", None)
