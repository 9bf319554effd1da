"""The LightningModule: network, optimizer, evaluation and checkpoints; `step` has the training step.

Shapes: B lanes, T segment, V vocabulary.
"""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from dsmr import UserError, as_user_error
from dsmr.batch import Segment
from dsmr.data.datamodule import MusicData
from dsmr.model import Backbone, RecurrentTransformer, Schedule
from dsmr.results.piece_table import PieceTable
from dsmr.results.run_files import SECTION
from dsmr.share.description import check_same_network, describe_network
from dsmr.share.loading import load_model
from dsmr.training.checkpoint import gather_random_states, is_resumable, random_state, restore_random_state
from dsmr.training.lightning_internals import trainer_of
from dsmr.training.optimizers import AdamW, WarmupCosine
from dsmr.training.scores import SplitScores
from dsmr.training.step import TrainingStep

BackboneCallable = Callable[..., Backbone]
"""Called with vocab_size, segment_length, and horizons if it takes them."""


class RecurrentLM(TrainingStep):
    """Trains and evaluates a recurrent language model on lanes of segments.

    Args:
        horizons: tokens that each layer remembers, bottom to top (`2x3584+10x512`), or a schedule; None for a
            network without horizons.
        backbone: the network; called with vocab_size, segment_length, and horizons if it takes them.
        optimizer: called with two parameter groups: matrices, and everything else without weight decay.
        lr_scheduler: called with the optimizer; stepped after every optimizer step.
        asked_weight: Loss weight of the answers in generated pieces; all other targets have weight 1.
        vocab_size: V; on the command line it comes from the data.
        segment_length: T; on the command line it comes from the data.
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
        if asked_weight < 0:
            raise UserError(f"model.asked_weight is {asked_weight}; it must be at least 0")
        super().__init__(build_backbone(backbone, vocab_size, segment_length, horizons), asked_weight)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.scores = SplitScores(vocab_size)
        self._restored_random: Any = None

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's takes hyperparameters, which these have none of
        cls, checkpoint_path: str | Path, map_location: Any = None, **settings: Any
    ) -> Self:
        """Rebuild a trained module from a run, a checkpoint file or an exported folder.

        Args:
            checkpoint_path: see `dsmr.share.loading.load_model`.
            map_location: device of the weights; None means the CPU.
            settings: constructor arguments that do not concern the network, such as `optimizer`.
        """
        backbone = load_model(checkpoint_path).backbone
        sizes = {"vocab_size": backbone.vocab_size, "segment_length": backbone.segment_length}
        return cls(None, lambda **_: backbone, **{**sizes, **settings}).to(map_location or "cpu").train()

    def setup(self, stage: str) -> None:
        """Take from the data what the scores need."""
        if self._data is not None:
            self.check_data(self._data)
            self.scores.use_data(self._data)

    def check_data(self, data: MusicData) -> None:
        """Raise `UserError` for horizons above 0 with isolated windows, which never read a memory."""
        if data.windows is not None and any(self.backbone.horizons):
            off = f"{len(self.backbone.horizons)}x0"
            raise UserError(f"data.windows are isolated and read no memory; set model.horizons to {off}")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer over matrices and everything else, and its schedule."""
        with as_user_error("model.optimizer: "):
            optimizer = self.optimizer(self._parameter_groups())
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UserError(
                "model.lr_scheduler: ReduceLROnPlateau is not supported, since a resumed run would take other rates; "
                "use dsmr.training.WarmupCosine or another schedule of torch.optim.lr_scheduler"
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

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Return matrices, described for `Muon`, and everything else, which is never decayed."""
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
        others = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
        return [{"params": decayed, **described}, others]

    @property
    def section(self) -> dict[str, Any]:
        """Description of network, tokenizer and data for a checkpoint, see `describe_network`."""
        data = self._data
        if data is None:
            return describe_network(self.backbone, None)
        collection = data.store.description.partition(" in ")[0]
        return describe_network(self.backbone, vars(data.tokenizer_spec), collection, data.tokens_per_second)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description, and to a checkpoint that can resume, RNG state and training memory."""
        section = checkpoint[SECTION] = self.section
        if not is_resumable(checkpoint):
            checkpoint.pop(type(self._data).__qualname__, None)
            return
        failed = self._pending.is_computed  # a step that is rolled back
        random = self._pending.random_state if failed else random_state(self.device)
        section["random"] = gather_random_states(random, self.trainer)
        memory = self.memories.training_state(self.trainer)
        if memory is not None:
            section["memory"] = memory

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, and keep its RNG state and memory until training starts."""
        section, trainer = checkpoint.get(SECTION), trainer_of(self)
        if section is None:
            return
        is_resumed = trainer is not None and trainer.state.fn == "fit"
        check_same_network(section, describe_network(self.backbone, None), horizons_too=is_resumed)
        if is_resumed:
            self._restored_random, self.memories.restored = section["random"], section.get("memory")

    def on_fit_start(self) -> None:
        """Drop the memories of an earlier run."""
        super().on_fit_start()
        self.memories.clear()

    def on_train_start(self) -> None:
        """Restore the RNG state of the resumed run."""
        saved, self._restored_random = self._restored_random, None
        if saved is not None:
            own = saved if isinstance(saved, dict) else saved[self.global_rank]  # format 1: of one process
            restore_random_state(own, self.device)

    @property
    def _evaluated_split(self) -> str:
        trainer = trainer_of(self)
        return "test" if trainer is not None and trainer.testing else "validation"

    def on_validation_epoch_start(self) -> None:
        """Begin with an empty memory."""
        self.memories.pop(self._evaluated_split, None)
        self.scores.reset()

    def validation_step(self, batch: Segment) -> None:
        """Score a segment of the split."""
        memory = self.memories.get_or_init(self._evaluated_split, len(batch.is_start_B))
        logits_BTV, update = self.backbone(batch.tokens_BT, memory, batch.is_start_B)
        memory.commit(update)
        self.scores.update(batch, logits_BTV)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the split, and drop its memory."""
        split, trainer = self._evaluated_split, trainer_of(self)
        self.memories.pop(split, None)
        prefix = "test" if split == "test" else "val"
        logged = {f"{prefix}/{k}": v.float().to(self.device) for k, v in self.scores.compute(split).items()}
        # all processes have the same values already: the maximum of equal values is that value, bit for bit
        self.log_dict(logged, sync_dist=trainer is not None and trainer.world_size > 1, reduce_fx="max")

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step
    on_test_epoch_end = on_validation_epoch_end

    @property
    def piece_table(self) -> PieceTable | None:
        """Results by piece of the split that was evaluated last."""
        return self.scores.piece_table


def build_backbone(
    build: BackboneCallable, vocab_size: int, segment_length: int, horizons: Schedule | str | None
) -> Backbone:
    """Build a network; `horizons` go only to constructors that take them, for others they raise `UserError`."""
    given: dict[str, Any] = {"vocab_size": vocab_size, "segment_length": segment_length}
    if takes_horizons(build):
        given["horizons"] = horizons
    elif horizons is not None:
        raise UserError("this network has no horizons; set model.horizons to null")
    with as_user_error():  # a user's own network may raise any ValueError
        return build(**given)


def takes_horizons(build: BackboneCallable) -> bool:
    """True if a network's class, a partial of it, or any other callable has a parameter `horizons`."""
    candidates = (build, getattr(build, "func", None), *getattr(build, "args", ()))  # jsonargparse makes partials
    network = next((one for one in candidates if isinstance(one, type)), None)
    own = [build] if network is None else [vars(cls)["__init__"] for cls in network.__mro__ if "__init__" in vars(cls)]
    for function in own:  # **settings go to the next class
        parameters = inspect.signature(function).parameters
        if "horizons" in parameters:
            return True
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            return False
    return network is None
