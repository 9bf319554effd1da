"""What is compared, and how.

Shapes: B lanes, T segment, V vocabulary.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dsmr import UserError
from dsmr.attention.backends import Backend
from dsmr.benchmark.variants import FULL_BUDGETS, WINDOW_SEGMENTS, Row, Sizes, build, named_rows, variant_rows
from dsmr.model.backbone import network_name
from dsmr.model.blocks import Decoder
from dsmr.model.memory import Memory

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Settings:
    """How rows are compared; their sizes come from model and data.

    Args:
        horizons: a row of ours for each name, with its horizons, `full` being what the others are compared with; None
            for the rows of the paper's table at the configuration's budget.
        materialised: names of rows that are measured again with a score matrix that is kept.
        peers: also x-transformers and perceiver-ar-pytorch, where they are installed.
        rows: only these rows; empty means all.
        precisions: of training, a row for each; empty means the trainer's.
        prefix_length: of the Perceivers, and of x-transformers' memory; None means full's horizon.
        repeats: turns that count.
        warmup: turns that do not.
        steps: training steps of a turn; one more goes before them untimed, since another row has just used the caches.
        decode_tokens: tokens that are decoded in a step; 0 leaves decoding out.
        decode_lanes: continuations at a time, one row for each number.
        piece_lengths: tokens of a piece after which time and memory are noted, for `full` and `two_scale`.
        train_tokens: train each of our rows on so many tokens and validate it; 0 leaves that out.
    """

    horizons: dict[str, str] | None = None
    materialised: list[str] = field(default_factory=lambda: ["full", "two_scale"])
    peers: bool = True
    rows: list[str] = field(default_factory=list)
    precisions: list[Precision] = field(default_factory=list)
    prefix_length: int | None = None
    repeats: int = 7
    warmup: int = 1
    steps: int = 2
    decode_tokens: int = 32
    decode_lanes: list[int] = field(default_factory=lambda: [1])
    piece_lengths: list[int] = field(default_factory=lambda: [1024, 4096, 16_384, 65_536, 131_072])
    train_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("repeats", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"benchmark.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("warmup", "decode_tokens", "train_tokens"):
            if getattr(self, name) < 0:
                raise UserError(f"benchmark.{name} is {getattr(self, name)}; it must not be below 0")
        for name in ("decode_lanes", "piece_lengths"):
            if any(number < 1 for number in getattr(self, name)):
                raise UserError(f"benchmark.{name} {getattr(self, name)} must all be at least 1")
        if self.horizons is not None and "full" not in self.horizons:
            raise UserError("benchmark.horizons must have the row `full`: what the others are compared with")
        if self.prefix_length is not None and self.prefix_length < 1:
            raise UserError(f"benchmark.prefix_length is {self.prefix_length}; it must be at least 1")


@dataclass(frozen=True)
class Workload:
    """Settings with the sizes, the place and the precision that they are measured at.

    Args:
        settings: how rows are compared.
        like: a network whose sizes all have; its horizons' sum is the budget of the paper's rows.
        num_lanes: B.
        place: the device.
        precision: of training.
        seed: of weights and tokens.

    Raises:
        UserError: a precision that the place lacks, a budget of nothing, or a row that is not known.
    """

    settings: Settings
    like: Decoder
    num_lanes: int
    place: torch.device
    precision: str = "32-true"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.like, Decoder):
            raise UserError(
                f"{network_name(type(self.like))} is not made of dsmr's layers, whose sizes the rows have; leave out "
                "model.backbone, or derive the network from dsmr.model.RecurrentTransformer"
            )
        if self.precision not in DTYPES:
            raise UserError(f"precision {self.precision} is not measured; choose from {', '.join(DTYPES)}")
        if self.precision == "16-mixed" and self.place.type == "cpu":
            raise UserError("precision 16-mixed needs a CUDA device; use bf16-mixed or 32-true")
        if self.settings.horizons is None and not sum(self.like.horizons):
            raise UserError("the rows need a budget: give model.horizons, for example 2x3584+10x512")

    @property
    def segment_length(self) -> int:
        """T."""
        return self.like.segment_length

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.like.vocab_size

    @property
    def form(self) -> Backend:
        """Of all our rows but the materialised ones."""
        return self.like.settings.attention

    @property
    def dtype(self) -> torch.dtype:
        """Of keys, values and matrix products."""
        return DTYPES[self.precision]

    def known_rows(self) -> tuple[dict[str, Row], dict[str, str]]:
        """Networks by name, and why others are left out."""
        num_layers = len(self.like.blocks)
        if self.settings.horizons is not None:
            rows = named_rows(self.settings.horizons, num_layers)
            return rows | {"perceiver_ar": Row(None)}, {}
        sizes = Sizes(num_layers, self.segment_length, sum(self.like.horizons), self.like.memory_block)
        rows, absent = variant_rows(sizes)
        if self.num_lanes % WINDOW_SEGMENTS:
            del rows["windowed"]
            absent["windowed"] = f"{self.num_lanes} lanes do not make whole windows of {WINDOW_SEGMENTS} segments"
        return rows, absent

    @property
    def prefix_length(self) -> int:
        """Of the Perceivers and of x-transformers' memory."""
        if self.settings.prefix_length is not None:
            return self.settings.prefix_length
        full = self.known_rows()[0]["full"].horizons
        return full[0] if full else FULL_BUDGETS * self.segment_length

    def lanes_of(self, row: Row) -> int:
        """B, of windows a quarter: as many tokens in a step."""
        return self.num_lanes // WINDOW_SEGMENTS if row.windows else self.num_lanes

    def network(self, row: Row, form: Backend, *, is_compiled: bool = True) -> Decoder:
        """A row's network, with the same weights in every form, without dropout.

        Args:
            row: of the table.
            form: of its attention.
            is_compiled: compile its layers if the configuration says so; never where a plain form is the point.
        """
        torch.manual_seed(self.seed)
        is_plain = not is_compiled or form in ("reference", "materialised")
        changes = {
            "attention": form,
            "dropout": 0.0,
            "compile_blocks": False if is_plain else self.like.settings.compile_blocks,
        }
        return build(row, self.like, prefix_length=self.prefix_length, **changes).to(self.place)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of every forward pass."""
        return nullcontext() if self.precision == "32-true" else torch.autocast(self.place.type, dtype=self.dtype)

    def at(self, precision: str) -> "Workload":
        """The same in another precision."""
        return replace(self, precision=precision)

    def tokens(self) -> "Tokens":
        """The tokens that every row reads, from the first."""
        return Tokens(self)

    @torch.no_grad()
    def filled(self, network: Decoder, num_lanes: int, *, decoding: bool = False) -> Memory:
        """A memory in the middle of a piece: every layer has read as much as it keeps."""
        tokens, length = self.tokens(), network.segment_length
        with self.autocast():
            memory = network.init_memory(num_lanes, decoding=decoding)
            longest = max((*network.horizons, getattr(network, "prefix_length", 0)))
            for _ in range(-(-longest // length)):
                _, update = network(tokens.draw(num_lanes, length), memory)
                memory.commit(update)
        return memory


class Tokens:
    """The same random tokens for all rows."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.draws = torch.Generator().manual_seed(workload.seed)

    def draw(self, num_lanes: int, length: int) -> Tensor:
        """Token ids, (B, length), on the device."""
        drawn = torch.randint(4, self.workload.vocab_size, (num_lanes, length), generator=self.draws)
        return drawn.to(self.workload.place)
