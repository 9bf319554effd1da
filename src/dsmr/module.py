"""The LightningModule: a recurrent backbone, its memories, its loss and its figures.

B lanes, T segment, V vocabulary. A training step reads one segment with the memory of the segments before it;
the memory is written after backward, so that autograd never sees it change. Each split holds its own memory.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from dsmr import checkpoint as checkpoints
from dsmr.metrics import PositionPerplexity, RecallPerplexity, TokenNLL
from dsmr.model import Backbone, RecurrentTransformer, Schedule
from dsmr.model.memory import Memory, Update
from dsmr.optim import AdamW, WarmupCosine

IGNORED = -100
BackboneCallable = Callable[[int, Schedule | str | None, int], Backbone]


class Batch(Protocol):
    """What the module reads of a batch; `dsmr.data.lanes.Segment` explains the fields."""

    tokens_BT: Tensor
    targets_BT: Tensor
    is_start_B: Tensor
    position_B: Tensor
    microseconds_B: Tensor
    distance_BT: Tensor
    step: int


class RecurrentLM(LightningModule):
    """Trains and evaluates a recurrent language model on lanes of segments.

    Args:
        horizons: tokens that each layer remembers, bottom to top (`2x3584+10x512`), or a schedule; None for a
            network that has none.
        backbone: the network; called with (vocab_size, horizons, segment_length).
        optimizer: called with two parameter groups, matrices and the rest; the rest is never decayed.
        lr_scheduler: called with the optimizer; stepped after every optimizer step.
        asked_weight: weight in the loss of the tokens that generated pieces ask for; the others have 1.
        vocab_size: V; on the command line it comes from the data.
        segment_length: T; on the command line it comes from the data.

    Raises:
        ValueError: horizons or sizes that do not fit together.
    """

    def __init__(
        self,
        horizons: Schedule | str | None = "2x3584+10x512",
        backbone: BackboneCallable = RecurrentTransformer,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable = WarmupCosine,
        asked_weight: float = 1.0,
        *,
        vocab_size: int = 392,
        segment_length: int = 512,
    ) -> None:
        super().__init__()
        self.backbone = backbone(vocab_size, horizons, segment_length)
        self.optimizer, self.lr_scheduler, self.asked_weight = optimizer, lr_scheduler, asked_weight
        self._memories: dict[str, Memory] = {}
        self._update: Update | None = None
        self._restored: dict[str, Any] | None = None
        self.nll, self.positions = TokenNLL(), PositionPerplexity()
        self.recall: RecallPerplexity | None = None
        self.note_on_V: Tensor
        self.register_buffer("note_on_V", torch.zeros(vocab_size, dtype=torch.bool), persistent=False)

    def setup(self, stage: str) -> None:
        """Take from the data which tokens begin notes, and what generated pieces ask.

        Raises:
            ValueError: a memory that isolated windows would never read.
        """
        data = self._data
        if data is not None:
            self.check_data(data)
            self.note_on_V.copy_(torch.from_numpy(data.note_on_mask))
            self.recall = RecallPerplexity(data.recall_distances) if data.recall_distances else None
            if self.recall:
                self.recall.to(self.device)

    def check_data(self, data: Any) -> None:
        """Refuse a memory that isolated windows would never read.

        Raises:
            ValueError: windows and horizons above 0.
        """
        if data.windows is not None and any(self.backbone.horizons):
            off = f"{len(self.backbone.horizons)}x0"
            raise ValueError(f"data.windows are isolated and read no memory; set model.horizons to {off}")

    def training_step(self, batch: Batch) -> Tensor:
        """Mean NLL over B * T positions: a constant denominator, so that padding changes no gradient's weight."""
        logits_BTV, self._update = self.backbone(batch.tokens_BT, self._memory("train", batch), batch.is_start_B)
        nll_BT = token_nll(logits_BTV, batch.targets_BT)
        is_real_BT = batch.targets_BT != IGNORED
        self.log("train/nll", nll_BT.detach().sum() / is_real_BT.sum().clamp(min=1), prog_bar=True)
        if self._data is not None:
            self._data.advance(batch.step)
        extra_BT = nll_BT * (batch.distance_BT > 0)
        return (nll_BT.sum() + (self.asked_weight - 1) * extra_BT.sum()) / nll_BT.numel()

    def on_after_backward(self) -> None:
        """Write the segment into the training memory, now that no gradient needs the old one."""
        assert self._update is not None
        self._memories["train"].commit(self._update)
        self._update = None

    def on_validation_epoch_start(self) -> None:
        """Begin with an empty memory of its own."""
        self._begin_evaluation("validation")

    def on_test_epoch_start(self) -> None:
        """Begin with an empty memory of its own."""
        self._begin_evaluation("test")

    def validation_step(self, batch: Batch) -> None:
        """Add a segment to the figures of the validation split."""
        self._evaluate(batch, "validation")

    def test_step(self, batch: Batch) -> None:
        """Add a segment to the figures of the test split."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the split's figures and let its memory go."""
        self._end_evaluation("validation", "val")

    def on_test_epoch_end(self) -> None:
        """Log the split's figures and let its memory go."""
        self._end_evaluation("test", "test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer over matrices and the rest, and its schedule.

        Raises:
            ValueError: a cosine without an end.
        """
        parameters = [p for p in self.backbone.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2]},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = self.optimizer(groups)
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, WarmupCosine) and scheduler.total_steps is None:
            if self.trainer.max_steps < 0:
                raise ValueError("the cosine needs an end: set trainer.max_steps, or model.lr_scheduler.total_steps")
            scheduler.total_steps = self.trainer.max_steps
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the network's description, and to a checkpoint that can resume, the training memory."""
        spec = None if self._data is None else vars(self._data.tokenizer_spec)
        section = checkpoint[checkpoints.SECTION] = checkpoints.describe(self.backbone, spec)
        if not checkpoints.is_resumable(checkpoint):
            checkpoint.pop(type(self._data).__qualname__, None)
        elif "train" in self._memories:
            section["memory"] = self._memories["train"].state_dict()
            section["random"] = random_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the saved training memory and random state until training starts.

        Raises:
            ValueError: the network has other sizes, or training goes on with other horizons or processes.
        """
        section = checkpoint.get(checkpoints.SECTION)
        if section is None:
            return
        is_resumed = self._trainer is not None and self.trainer.state.fn == "fit"
        present = checkpoints.describe(self.backbone, None)
        checkpoints.check_same(section, present, horizons_too=is_resumed)
        if is_resumed:
            self._restored = section
            if self.trainer.world_size > 1:
                raise ValueError("a run of several processes cannot be resumed yet; go on with a single one")

    def on_fit_start(self) -> None:
        """Forget the memories of an earlier run."""
        self._memories.clear()

    def on_train_start(self) -> None:
        """Go on drawing where the resumed run stopped."""
        if self._restored is not None:
            restore_random_state(self._restored["random"], self.device)

    def training_state(self) -> list[Tensor]:
        """Keys and values of the training memory, (B, H, M, D); none before the first step."""
        memory = self._memories.get("train")
        return [] if memory is None else [*memory.keys, *memory.values]

    @property
    def _data(self) -> Any:
        return None if self._trainer is None else getattr(self.trainer, "datamodule", None)

    def _memory(self, split: str, batch: Batch) -> Memory:
        """Memory of a split; made in the first step, when the compute precision is known."""
        if split not in self._memories:
            self._memories[split] = self.backbone.init_memory(len(batch.is_start_B))
            if split == "train" and self._restored is not None:
                self._memories[split].load_state_dict(self._restored["memory"])
                self._restored = None
        return self._memories[split]

    def _begin_evaluation(self, split: str) -> None:
        self._memories.pop(split, None)
        self.nll.reset()
        self.positions.reset()
        if self.recall:
            self.recall.reset()

    def _evaluate(self, batch: Batch, split: str) -> None:
        memory = self._memory(split, batch)
        logits_BTV, update = self.backbone(batch.tokens_BT, memory, batch.is_start_B)
        memory.commit(update)
        nll_BT = token_nll(logits_BTV, batch.targets_BT)
        is_real_BT = batch.targets_BT != IGNORED
        is_note_BT = self.note_on_V[batch.targets_BT.clamp(min=0)]
        self.nll.update(nll_BT, is_real_BT, is_note_BT, batch.microseconds_B)
        self.positions.update(nll_BT, is_real_BT, batch.position_B)
        if self.recall:
            self.recall.update(nll_BT, batch.distance_BT)

    def _end_evaluation(self, split: str, prefix: str) -> None:
        self._memories.pop(split, None)
        figures = self.nll.compute()
        self.log_dict({f"{prefix}/{name}": value.float() for name, value in figures.items()})
        by_position = {name: value for name, value in self.positions.compute().items() if value.isfinite()}
        self.log_dict({f"{prefix}/position/{name}": value.float() for name, value in by_position.items()})
        if self.recall:
            recall = self.recall.compute()
            self.log_dict({f"{prefix}/recall/{name}": value.float() for name, value in recall.items()})


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's generators on the host and on `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Set torch's generators to a saved state."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def token_nll(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Nats of every target, float32 (B, T); 0 where the target is ignored."""
    dtype = torch.promote_types(logits_BTV.dtype, torch.float32)
    return F.cross_entropy(
        logits_BTV.to(dtype).flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(targets_BT)
