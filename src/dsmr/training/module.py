"""The LightningModule: a recurrent backbone, its memories, its loss and its figures.

B lanes, T segment, V vocabulary. A training step reads one segment with the memory of the segments before it;
the memory is written after backward, so that autograd never sees it change, and after the optimizer step that
follows, so that a step which fails for its numbers leaves everything as it was. Each split holds its own memory.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from dsmr import UserError
from dsmr.batch import IGNORED, Segment
from dsmr.model import Backbone, RecurrentTransformer, Schedule
from dsmr.model.memory import Memory, Update, map_lanes
from dsmr.results.piece_table import PieceTable
from dsmr.results.run_files import SECTION
from dsmr.share.description import check_same_network, describe_network
from dsmr.share.loading import load_model
from dsmr.training.checkpoint import is_resumable
from dsmr.training.metrics import PieceNLL, PositionPerplexity, RecallPerplexity, TokenNLL
from dsmr.training.optimizers import AdamW, WarmupCosine

BackboneCallable = Callable[..., Backbone]
"""Called with vocab_size, segment_length, and horizons unless they are None."""


class NotFiniteError(UserError):
    """A loss or a gradient is no number any more; the message names piece, position and step.

    Args:
        message: all that.
        is_undone: whether weights, optimizer, memory and place are those before the step that failed.
    """

    def __init__(self, message: str, *, is_undone: bool) -> None:
        super().__init__(message)
        self.is_undone = is_undone


class RecurrentLM(LightningModule):
    """Trains and evaluates a recurrent language model on lanes of segments.

    Args:
        horizons: tokens that each layer remembers, bottom to top (`2x3584+10x512`), or a schedule; None for a
            network that has none.
        backbone: the network; called with vocab_size, segment_length, and horizons unless they are None.
        optimizer: called with two parameter groups, matrices and the rest; the rest is never decayed.
        lr_scheduler: called with the optimizer; stepped after every optimizer step.
        asked_weight: weight in the loss of the tokens that generated pieces ask for; the others have 1.
        vocab_size: V; on the command line it comes from the data.
        segment_length: T; on the command line it comes from the data.

    Raises:
        UserError: horizons or sizes that do not fit together.
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
        if asked_weight < 0:
            raise UserError(f"model.asked_weight is {asked_weight}; it must be at least 0")
        self.backbone = build_backbone(backbone, vocab_size, segment_length, horizons)
        self.optimizer, self.lr_scheduler, self.asked_weight = optimizer, lr_scheduler, asked_weight
        self._memories: dict[str, Memory] = {}
        self._update: Update | None = None
        self._restored: dict[str, Any] | None = None
        self._batch: tuple[Segment, Tensor] | None = None  # and its NLL, until it is written into the memory
        self._is_finite: Tensor
        self._is_stepping = False
        self._bad_place = torch.full((2,), -1)
        self._random_before: dict[str, Tensor] = {}
        self.nll, self.positions = TokenNLL(), PositionPerplexity()
        self.recall: RecallPerplexity | None = None
        self.pieces: PieceNLL | None = None
        self.piece_table: PieceTable | None = None
        self.note_on_V: Tensor
        self.family_V: Tensor
        self.register_buffer("note_on_V", torch.zeros(vocab_size, dtype=torch.bool), persistent=False)
        self.register_buffer("family_V", torch.zeros(vocab_size, dtype=torch.long), persistent=False)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's takes hyperparameters, which these have none of
        cls, checkpoint_path: str | Path, map_location: Any = None, **settings: Any
    ) -> Self:
        """Rebuild a trained module from a run, a checkpoint file or an exported folder.

        Args:
            checkpoint_path: see `load_model`.
            map_location: device of the weights; None means the CPU.
            settings: constructor arguments that have nothing to do with the network, such as `optimizer`.

        Raises:
            UserError: there is no checkpoint, or it cannot be used.
        """
        backbone = load_model(checkpoint_path).backbone
        sizes = {"vocab_size": backbone.vocab_size, "segment_length": backbone.segment_length}
        made = cls(None, lambda **_: backbone, **{**sizes, **settings})
        return made.to(map_location or "cpu").train()

    def setup(self, stage: str) -> None:
        """Take from the data what tokens are about, which pieces there are, and what generated ones ask.

        Raises:
            UserError: a memory that isolated windows would never read.
        """
        data = self._data
        if data is not None:
            self.check_data(data)
            self.note_on_V.copy_(torch.from_numpy(data.note_on_mask))
            self.family_V.copy_(torch.from_numpy(data.token_families))
            self.pieces = PieceNLL(len(data.store.pieces), len(data.families)).to(self.device)
            self.recall = RecallPerplexity(data.recall_distances) if data.recall_distances else None
            if self.recall:
                self.recall.to(self.device)

    def check_data(self, data: Any) -> None:
        """Refuse a memory that isolated windows would never read.

        Raises:
            UserError: windows and horizons above 0.
        """
        if data.windows is not None and any(self.backbone.horizons):
            off = f"{len(self.backbone.horizons)}x0"
            raise UserError(f"data.windows are isolated and read no memory; set model.horizons to {off}")

    def on_train_batch_start(self, batch: Segment, batch_idx: int) -> None:
        """Remember where drawing stands, for a step that is undone."""
        self._random_before = random_state(self.device)

    def training_step(self, batch: Segment) -> Tensor:
        """Mean NLL over B * T positions: a constant denominator, so that padding changes no gradient's weight."""
        logits_BTV, self._update = self.backbone(batch.tokens_BT, self._memory("train", batch), batch.is_start_B)
        nll_BT = token_nll(logits_BTV, batch.targets_BT)
        self._batch = (batch, nll_BT.detach())
        totals = self._summed(torch.stack([nll_BT.detach().sum(), (batch.targets_BT != IGNORED).sum()]))
        self._is_finite = totals[0].isfinite()
        self.log("train/nll", totals[0] / totals[1].clamp(min=1), prog_bar=True)
        extra_BT = nll_BT * (batch.distance_BT > 0)
        return (nll_BT.sum() + (self.asked_weight - 1) * extra_BT.sum()) / nll_BT.numel()

    def on_after_backward(self) -> None:
        """Within an accumulation of gradients, no optimizer step follows."""
        if not self._is_stepping:
            self._check_finite(self._is_finite)
            self._write()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's step around forward and backward; then the segment is written into the memory."""
        self._is_stepping = True
        try:
            super().optimizer_step(*args, **kwargs)
        finally:
            self._is_stepping = False
        self._write()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and stop before anything that is no number reaches the weights.

        Raises:
            NotFiniteError: the loss or a gradient is not finite; in float16 the scaler skips such gradients.
        """
        parameters = [p for p in self.parameters() if p.grad is not None]
        if isinstance(self.trainer.strategy, FSDPStrategy):  # knows the norm over all shards
            norm = self.trainer.model.clip_grad_norm_(gradient_clip_val or torch.inf)  # type: ignore[union-attr,operator]
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if gradient_clip_val and gradient_clip_algorithm == "norm":
                torch.nn.utils.clip_grads_with_norm_(parameters, float(gradient_clip_val), norm)
            else:
                self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.log("train/gradient_norm", norm)
        is_scaled = self.trainer.precision == "16-mixed"
        self._check_finite(self._is_finite if is_scaled else self._is_finite & norm.isfinite())

    def _write(self) -> None:
        """Write the segment into the training memory, now that no gradient needs the old one, and go on."""
        assert self._update is not None
        assert self._batch is not None
        self._memories["train"].commit(self._update)
        if self._data is not None:
            self._data.advance(self._batch[0].step)
        self._update = self._batch = None

    def _summed(self, totals: Tensor) -> Tensor:
        """Over all processes."""
        if self._trainer is not None and self.trainer.world_size > 1:
            torch.distributed.all_reduce(totals)
        return totals

    def _check_finite(self, is_finite: Tensor) -> None:
        if bool(is_finite):
            return
        assert self._batch is not None
        batch, nll_BT = self._batch
        bad_B = ~nll_BT.isfinite().all(dim=1)
        what = "a gradient" if bool(self._is_finite) else "the loss"
        lanes = [lane for lane in range(len(bad_B)) if bad_B[lane] or bool(self._is_finite)]
        places = [self._place(batch.piece_B[i], batch.position_B[i]) for i in lanes if batch.piece_B[i] >= 0]
        where = "; ".join(places) or "another process"
        raise NotFiniteError(
            f"{what} is not finite at step {self.trainer.global_step + 1}, in {where}; the weights were not changed. "
            "Lower model.optimizer.lr or trainer.gradient_clip_val, or choose another trainer.precision, and go on "
            "with dsmr fit --resume RUN",
            is_undone=self.trainer.accumulate_grad_batches == 1,
        )

    def _place(self, piece: Tensor, position: Tensor) -> str:
        number, first = int(piece), int(position)
        name = f"piece {number}" if self._data is None else self._data.store.pieces[number].name
        return f"{name} from token {first:,} on"

    def on_validation_epoch_start(self) -> None:
        """Begin with an empty memory of its own."""
        self._begin_evaluation("validation")

    def on_test_epoch_start(self) -> None:
        """Begin with an empty memory of its own."""
        self._begin_evaluation("test")

    def validation_step(self, batch: Segment) -> None:
        """Add a segment to the figures of the validation split."""
        self._evaluate(batch, "validation")

    def test_step(self, batch: Segment) -> None:
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
            UserError: a cosine without an end, a plateau schedule, or nothing to train.
        """
        parameters = [p for p in self.backbone.parameters() if p.requires_grad]
        if not parameters:
            raise UserError("all parameters are frozen; remove the callback that freezes them")
        embedded = {m.weight for m in self.backbone.modules() if isinstance(m, nn.Embedding)}
        decayed = [p for p in parameters if p.dim() >= 2]
        stacked = self.backbone.stacked_rows()
        described = {
            "is_embedding": [p in embedded for p in decayed],
            "rows": [list(stacked.get(p, (len(p),))) for p in decayed],
        }
        groups = [
            {"params": decayed, **described},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        try:
            optimizer = self.optimizer(groups)
        except ValueError as error:  # torch's word on a setting
            raise UserError(f"model.optimizer: {error}") from error
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UserError(
                "model.lr_scheduler: ReduceLROnPlateau is not supported, since a resumed run would take other rates; "
                "use dsmr.training.optimizers.WarmupCosine or another schedule of torch.optim.lr_scheduler"
            )
        if isinstance(scheduler, WarmupCosine) and scheduler.total_steps is None:
            steps = self.trainer.estimated_stepping_batches
            if steps < 1 or math.isinf(steps):
                raise UserError(
                    "the cosine needs an end: set trainer.max_steps, trainer.max_epochs or "
                    "model.lr_scheduler.total_steps"
                )
            scheduler.total_steps = int(steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the network's description, and to a checkpoint that can resume, the training memory."""
        section = checkpoint[SECTION] = self.section
        if not is_resumable(checkpoint):
            checkpoint.pop(type(self._data).__qualname__, None)
            return
        is_undone = self._batch is not None
        section["random"] = self._collected(self._random_before if is_undone else random_state(self.device))
        if "train" in self._memories:
            section["memory"] = self._gathered(self._memories["train"].state_dict())
        elif self._restored is not None and "memory" in self._restored:  # before the first batch of a resumed run
            section["memory"] = self._restored["memory"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the saved training memory and random state until training starts.

        Raises:
            UserError: the network has other sizes, or training goes on with other horizons or processes.
        """
        section = checkpoint.get(SECTION)
        if section is None:
            return
        is_resumed = self._trainer is not None and self.trainer.state.fn == "fit"
        present = describe_network(self.backbone, None)
        check_same_network(section, present, horizons_too=is_resumed)
        if is_resumed:
            self._restored = section

    def on_fit_start(self) -> None:
        """Forget the memories of an earlier run."""
        self._memories.clear()

    def on_train_start(self) -> None:
        """Go on drawing where the resumed run stopped."""
        if self._restored is not None:
            saved = self._restored["random"]
            mine = saved if isinstance(saved, dict) else saved[self.global_rank]  # one process, in format 1
            restore_random_state(mine, self.device)

    @property
    def section(self) -> dict[str, Any]:
        """What a checkpoint says of the network, its tokenizer and its data; see `checkpoint.describe`."""
        spec = None if self._data is None else vars(self._data.tokenizer_spec)
        data = None if self._data is None else self._data.store.description.partition(" in ")[0]
        rate = None if self._data is None else self._data.tokens_per_second
        return describe_network(self.backbone, spec, data, rate)

    def training_state(self) -> list[Tensor]:
        """Keys and values of the training memory, (B, H, M, D); none before the first step."""
        memory = self._memories.get("train")
        return [] if memory is None else [*memory.keys, *memory.values]

    @property
    def _data(self) -> Any:
        return None if self._trainer is None else getattr(self.trainer, "datamodule", None)

    def _memory(self, split: str, batch: Segment) -> Memory:
        """Memory of a split; made in the first step, when the compute precision is known."""
        if split not in self._memories:
            self._memories[split] = self.backbone.init_memory(len(batch.is_start_B))
            if split == "train" and self._restored is not None:
                if "memory" in self._restored:
                    self._memories[split].load_state_dict(self._own_lanes(self._restored["memory"]))
                self._restored = None
        return self._memories[split]

    def _gathered(self, memory: dict[str, Any]) -> dict[str, Any]:
        """The memory of the lanes of all processes, in the order of their ranks; Lightning saves the first one's."""

        def lanes(tensor: Tensor) -> Tensor:
            parts = [torch.empty_like(tensor) for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather(parts, tensor.contiguous())
            return torch.cat([part.cpu() for part in parts])

        return memory if self.trainer.world_size == 1 else map_lanes(memory, lanes)

    def _own_lanes(self, memory: dict[str, Any]) -> dict[str, Any]:
        """Of a saved memory, the lanes of this process."""
        lanes = len(memory["length_B"]) // self.trainer.world_size
        own = slice(self.global_rank * lanes, (self.global_rank + 1) * lanes)
        return map_lanes(memory, lambda tensor: tensor[own])

    def _collected(self, state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """A state of each process."""
        states = [state] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(states, state)
        return states

    def _begin_evaluation(self, split: str) -> None:
        self._memories.pop(split, None)
        self._bad_place = torch.full((2,), -1, device=self.device)
        self.nll.reset()
        self.positions.reset()
        self.piece_table = None
        for metric in (self.pieces, self.recall):
            if metric:
                metric.reset()

    def _evaluate(self, batch: Segment, split: str) -> None:
        memory = self._memory(split, batch)
        logits_BTV, update = self.backbone(batch.tokens_BT, memory, batch.is_start_B)
        memory.commit(update)
        nll_BT = token_nll(logits_BTV, batch.targets_BT)
        is_real_BT = batch.targets_BT != IGNORED
        known_BT = batch.targets_BT.clamp(min=0)
        is_note_BT = self.note_on_V[known_BT]
        self._bad_place = first_bad(self._bad_place, nll_BT, batch)
        self.nll.update(nll_BT, is_real_BT, is_note_BT, batch.microseconds_B)
        self.positions.update(nll_BT, is_real_BT, batch.position_B)
        if self.pieces:
            where = (batch.piece_B, batch.position_B, self.family_V[known_BT], batch.microseconds_B)
            self.pieces.update(nll_BT, is_real_BT, *where)
        if self.recall:
            self.recall.update(nll_BT, batch.distance_BT)

    def _end_evaluation(self, split: str, prefix: str) -> None:
        self._memories.pop(split, None)
        figures = self.nll.compute()
        if not bool(figures["nll"].isfinite()) and bool(figures["tokens"]):
            piece, position = self._bad_place
            place = self._place(piece, position) if piece >= 0 else "another process"
            raise NotFiniteError(
                f"the {split} loss is not finite, first in {place}; the weights cannot be used in this precision",
                is_undone=False,
            )
        by_position = {name: value for name, value in self.positions.compute().items() if value.isfinite()}
        self._log_figures(prefix, figures)
        self._log_figures(f"{prefix}/position", by_position)
        if self.recall:
            self._log_figures(f"{prefix}/recall", self.recall.compute())
        if self.pieces:
            self.piece_table = piece_table(self.pieces, self._data)
            self._log_figures(f"{prefix}/family", family_nll(self.piece_table))

    def _log_figures(self, prefix: str, figures: dict[str, Tensor]) -> None:
        """Log what all processes know alike; the greatest of equal values is that value."""
        is_shared = self._trainer is not None and self.trainer.world_size > 1
        named = {f"{prefix}/{name}": value.float().to(self.device) for name, value in figures.items()}
        self.log_dict(named, sync_dist=is_shared, reduce_fx="max")


def build_backbone(
    build: BackboneCallable, vocab_size: int, segment_length: int, horizons: Schedule | str | None
) -> Backbone:
    """Build a network, with horizons if there are any.

    Raises:
        UserError: the constructor's own error, or a network without horizons was given some, or none where it needs
            them.
    """
    given = {} if horizons is None else {"horizons": horizons}
    try:
        return build(vocab_size=vocab_size, segment_length=segment_length, **given)
    except TypeError as error:
        if "'horizons'" not in str(error):
            raise
        needs = "this network has no horizons; set model.horizons to null"
        if horizons is None:
            needs = "this network needs horizons; set model.horizons, for example to 2x3584+10x512"
        raise UserError(needs) from error
    except ValueError as error:  # a user's own network may raise any
        raise UserError(str(error)) from error


def piece_table(metric: PieceNLL, data: Any) -> PieceTable:
    """Results by piece, of all processes."""
    sums = {name: total.cpu().double().numpy() for name, total in metric.compute().items()}
    names = [piece.name for piece in data.store.pieces]
    return PieceTable.from_sums(**sums, names=names, families=data.families, starts=PositionPerplexity.STARTS)


def family_nll(table: PieceTable) -> dict[str, Tensor]:
    """Nats per token of each family that there is."""
    nll_F, tokens_F = table.nll_PF.sum(axis=0), table.tokens_PF.sum(axis=0)
    figures = zip(table.families, nll_F, tokens_F, strict=True)
    return {name: torch.tensor(nll / tokens) for name, nll, tokens in figures if tokens}


def first_bad(known: Tensor, nll_BT: Tensor, batch: Segment) -> Tensor:
    """(piece, position) of the first segment whose NLL is not finite, (-1, -1) while there is none; never waits."""
    bad_B = ~nll_BT.isfinite().all(dim=1)
    lane = bad_B.int().argmax()
    here = torch.stack([batch.piece_B[lane], batch.position_B[lane]])
    return torch.where(bad_B.any() & (known[0] < 0), here, known)


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
