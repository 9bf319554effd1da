"""Generation in Lightning's way: `Trainer.predict` continues the pieces of a split."""

from collections.abc import Sequence

import numpy as np
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from miditok import MusicTokenizer

from dsmr import UserError
from dsmr.data.datamodule import PieceTokens
from dsmr.data.tokenizer import Performance, decode, open_ended
from dsmr.generate.continuations import Continuation, continuations
from dsmr.generate.generator import Generator, check_seed
from dsmr.generate.prompt import Prompt, cut_prompt
from dsmr.generate.sampling import Sampling
from dsmr.model import RecurrentTransformer, Schedule
from dsmr.model.backbone import evaluation_copy
from dsmr.training.module import BackboneCallable, RecurrentLM
from dsmr.training.optimizers import AdamW, WarmupCosine


class Predicted:
    """Result of `predict_step`; no dataclass, since Lightning would look for tensors inside.

    Args:
        name: of the piece.
        prompt: the part of it that was read.
        made: its continuations.
    """

    def __init__(self, name: str, prompt: Prompt, made: Sequence[Continuation]) -> None:
        self.name, self.prompt, self.made = name, prompt, made


class Continuer(RecurrentLM):
    """A trained `RecurrentLM` whose `predict_step` continues a piece.

    Args:
        horizons: see `RecurrentLM`, as for all up to `asked_weight`.
        backbone: the network.
        optimizer: unused.
        lr_scheduler: unused.
        asked_weight: unused.
        prompt_seconds: of each piece that are read.
        seconds: of new music.
        num: continuations of each piece.
        seed: of the first continuation's draws.
        sampling: how tokens are drawn.
        max_note_seconds: notes are ended after so long; None leaves it to the network.
        vocab_size: V; on the command line it comes from the data.
        segment_length: T; on the command line it comes from the data.

    Raises:
        UserError: no prompt, no music, or no continuations.
    """

    def __init__(
        self,
        horizons: Schedule | str | None = "2x3584+10x512",
        backbone: BackboneCallable = RecurrentTransformer,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable = WarmupCosine,
        asked_weight: float = 1.0,
        *,
        prompt_seconds: float = 30.0,
        seconds: float = 30.0,
        num: int = 1,
        seed: int = 0,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        max_note_seconds: float | None = None,
        vocab_size: int = 392,
        segment_length: int = 512,
    ) -> None:
        super().__init__(
            horizons,
            backbone,
            optimizer,
            lr_scheduler,
            asked_weight,
            vocab_size=vocab_size,
            segment_length=segment_length,
        )
        if min(prompt_seconds, seconds) <= 0 or num < 1:
            raise UserError(
                f"model.prompt_seconds ({prompt_seconds}) and model.seconds ({seconds}) must be above 0, model.num "
                f"({num}) at least 1"
            )
        check_seed("model.seed", seed, num)
        self.prompt_seconds, self.seconds, self.num, self.seed = prompt_seconds, seconds, num, seed
        self.sampling, self.max_note_seconds = sampling, max_note_seconds

    def predict_step(self, batch: PieceTokens) -> Predicted:
        """Continue the beginning of a piece."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        tokenizer: MusicTokenizer = data.tokenizer
        prompt = self.prompt_of(tokenizer, batch.ids.tolist(), batch.name, data.tokens_per_second)
        generator = Generator(evaluation_copy(self.backbone), tokenizer, self.sampling, self.max_note_seconds)
        made = continuations(generator, prompt, seconds=self.seconds, num=self.num, seed=self.seed)
        return Predicted(batch.name, prompt, made)

    def prompt_of(self, tokenizer: MusicTokenizer, ids: list[int], name: str, tokens_per_second: float) -> Prompt:
        """The beginning of a piece; by the data's mean number of tokens in a second where tokens tell no time."""
        ids = open_ended(tokenizer, ids)
        if isinstance(tokenizer, Performance):
            return cut_prompt(tokenizer, ids, self.prompt_seconds, name)
        ids = ids[: 1 + round(self.prompt_seconds * tokens_per_second)]
        end = float(decode(tokenizer, np.asarray(ids[1:], np.uint16)).to("second").end())
        return Prompt(ids, seam=end)
