"""Settings of the benchmark, and the workload that all rows share.

Shapes: B lanes, T segment, V vocabulary.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dsmr import UserError
from dsmr.attention.backends import Backend
from dsmr.benchmark.variants import FULL_BUDGETS, WINDOW_SEGMENTS, Row, VariantSizes, build_network, variant_rows
from dsmr.model.backbone import network_name
from dsmr.model.blocks import Decoder
from dsmr.model.memory import Memory
from dsmr.model.schedules import expand_horizons

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class BenchmarkSettings:
    """Settings of the comparison; sizes come from model and data.

    Args:
        horizons: Horizons of each row by name; must contain `full`, the reference. None: all variants at the
            configured budget.
        materialised: Rows to measure again with attention that saves its score matrix.
        peers: Also measure x-transformers and perceiver-ar-pytorch, if installed.
        rows: Names of the rows to measure (default: all).
        precisions: Training precisions to measure (default: the trainer's).
        prefix_length: Prefix of the Perceivers and memory of x-transformers, in tokens (default: full's horizon).
        repeats: Measured rounds.
        warmup: Rounds before those, not measured.
        steps: Training steps per round; one more, untimed, precedes them to refill the caches after another row.
        decode_tokens: Tokens decoded per step; 0 skips decoding.
        decode_lanes: Numbers of simultaneous continuations, one decoding row each.
        piece_lengths: Piece lengths in tokens at which `full` and `two_scale` report time and memory.
        train_tokens: Train each of our rows on this many tokens and validate it; 0 skips this.
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
        for name in ("repeats", "steps", "prefix_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"benchmark.{name} is {value}; it must be at least 1")
        for name in ("warmup", "decode_tokens", "train_tokens"):
            if getattr(self, name) < 0:
                raise UserError(f"benchmark.{name} is {getattr(self, name)}; it must not be below 0")
        for name in ("decode_lanes", "piece_lengths"):
            if any(number < 1 for number in getattr(self, name)):
                raise UserError(f"benchmark.{name} {getattr(self, name)} must all be at least 1")
        if self.horizons is not None and "full" not in self.horizons:
            raise UserError("benchmark.horizons must have the row `full`, the reference of the others")


@dataclass(frozen=True)
class Workload:
    """Sizes, device and precision shared by all rows.

    UserError if the device lacks the precision, the budget is 0, or the network is not made of dsmr's layers.
    """

    settings: BenchmarkSettings
    like: Decoder  # has the sizes of all rows; the sum of its horizons is the budget of the variants
    num_lanes: int  # B
    device: torch.device
    precision: str = "32-true"  # of training
    seed: int = 0  # of weights and tokens

    def __post_init__(self) -> None:
        if not isinstance(self.like, Decoder):
            raise UserError(
                f"{network_name(type(self.like))} is not made of dsmr's layers, whose sizes the rows have; leave out "
                "model.backbone, or derive the network from dsmr.model.RecurrentTransformer"
            )
        if self.precision not in DTYPES:
            raise UserError(f"precision {self.precision} is not measured; choose from {', '.join(DTYPES)}")
        if self.precision == "16-mixed" and self.device.type == "cpu":
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
    def backend(self) -> Backend:
        """Attention backend of all our rows except the materialised ones."""
        return self.like.settings.attention

    @property
    def dtype(self) -> torch.dtype:
        """Type of keys, values and matrix products."""
        return DTYPES[self.precision]

    def known_rows(self) -> tuple[dict[str, Row], dict[str, str]]:
        """Return our rows by name, and the reasons for the variants that are omitted."""
        num_layers = len(self.like.blocks)
        if self.settings.horizons is not None:
            rows = {name: Row(expand_horizons(text, num_layers)) for name, text in self.settings.horizons.items()}
            return rows | {"perceiver_ar": Row(None)}, {}
        sizes = VariantSizes(num_layers, self.segment_length, sum(self.like.horizons), self.like.memory_block)
        rows, absent = variant_rows(sizes)
        if self.num_lanes % WINDOW_SEGMENTS:
            del rows["windowed"]
            absent["windowed"] = f"{self.num_lanes} lanes do not make whole windows of {WINDOW_SEGMENTS} segments"
        return rows, absent

    @property
    def prefix_length(self) -> int:
        """Prefix of the Perceivers and memory of x-transformers, in tokens."""
        if self.settings.prefix_length is not None:
            return self.settings.prefix_length
        full = self.known_rows()[0]["full"].horizons
        return full[0] if full else FULL_BUDGETS * self.segment_length

    def lanes_of(self, row: Row) -> int:
        """Return B of a row: fewer lanes of isolated windows, so that a step has as many tokens."""
        return self.num_lanes // WINDOW_SEGMENTS if row.windows else self.num_lanes

    def network(self, row: Row, backend: Backend, *, is_compiled: bool = True) -> Decoder:
        """Build the network of a row without dropout; its weights do not depend on the backend.

        The layers are compiled only if configured, `is_compiled`, and not of a plain backend.
        """
        torch.manual_seed(self.seed)
        compiles = is_compiled and backend not in ("reference", "materialised") and self.like.settings.compile_blocks
        changes = {"attention": backend, "dropout": 0.0, "compile_blocks": compiles}
        return build_network(row, self.like, prefix_length=self.prefix_length, **changes).to(self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of every forward pass."""
        return nullcontext() if self.precision == "32-true" else torch.autocast(self.device.type, dtype=self.dtype)

    def tokens(self) -> "RandomTokens":
        """Return the stream of tokens that every row reads, from its start."""
        return RandomTokens(self)

    @torch.no_grad()
    def full_memory(self, network: Decoder, num_lanes: int, *, decoding: bool = False) -> Memory:
        """Return a memory as in the middle of a piece: every layer has read as much as it keeps."""
        tokens, length = self.tokens(), network.segment_length
        with self.autocast():
            memory = network.init_memory(num_lanes, decoding=decoding)
            longest = max((*network.horizons, getattr(network, "prefix_length", 0)))
            for _ in range(-(-longest // length)):
                _, update = network(tokens.draw(num_lanes, length), memory)
                memory.commit(update)
        return memory


class RandomTokens:
    """Random token ids, the same for all rows."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.generator = torch.Generator().manual_seed(workload.seed)

    def draw(self, num_lanes: int, length: int) -> Tensor:
        """Draw token ids (B, length) and move them to the device."""
        drawn = torch.randint(4, self.workload.vocab_size, (num_lanes, length), generator=self.generator)
        return drawn.to(self.workload.device)
