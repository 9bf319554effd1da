"""The registry of variants: the rows of the paper's table and ours, each at any depth and budget.

The benchmark, `dsmr estimate`, the sweep `paper_table`, the experiments and the tests take their rows from here. A new
variant is an entry of `VARIANTS` and its overlay; a test then asks for its name in `configs/sweeps/paper_table.yaml`.

All variants but `full`, `two_scale_whole`, `perceiver_ar`, `memoryless` and `windowed` spend the same budget, to the
token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsmr.model import Ascending, Binary, Descending, PerceiverAR, RecurrentTransformer, Schedule, TwoScale, Uniform
from dsmr.model.blocks import Decoder
from dsmr.model.horizons import check_horizons
from dsmr.model.schedules import Placement, expand_horizons

FULL_BUDGETS = 4  # the full reference spends this many times the budget of the others
WINDOW_SEGMENTS = 4  # length of an isolated window, in segments


@dataclass(frozen=True)
class VariantSizes:
    """Sizes that a variant's horizons are derived from, in tokens."""

    num_layers: int  # L
    segment_length: int  # T
    budget: int  # sum of the horizons
    block: int  # divides every horizon
    short: int | None = None  # the short horizon of two-scale schedules (default: T)
    num_long: int | None = None  # long layers of two-scale schedules (default: a sixth of the layers)
    num_kept: int | None = None  # layers that keep memory in binary schedules (default: a quarter of the layers)

    @property
    def full_horizon(self) -> int:
        """Horizon of every layer of the full reference, rounded down to whole blocks."""
        return FULL_BUDGETS * self.budget // self.num_layers // self.block * self.block

    @property
    def longest(self) -> int:
        """Longest horizon of the progressive schedules, the shortest being one block."""
        return max(self.block, 2 * self.budget // self.num_layers - self.block)

    def spend(self, schedule: Schedule, budget: int | None = None) -> tuple[int, ...]:
        """Scale a schedule to a budget (default: `self.budget`); raise UserError if no horizons have that sum."""
        return expand_horizons(schedule.fitted(self.budget if budget is None else budget, self.block), self.num_layers)

    def two_scale(self, placement: Placement = "lower") -> TwoScale:
        """Return the two-scale shape; `spend` then sets its long horizon."""
        short = self.segment_length if self.short is None else self.short
        num_long = max(1, self.num_layers // 6) if self.num_long is None else self.num_long
        return TwoScale(long=short, short=short, num_long=num_long, placement=placement)

    def binary(self) -> Binary:
        """Return the shape of selective retention."""
        return Binary(layers=max(1, self.num_layers // 4) if self.num_kept is None else self.num_kept)


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    overlay: str  # shipped config that turns base.yaml into this variant
    summary: str  # one line
    horizons: Callable[[VariantSizes], tuple[int, ...]] | None  # bottom to top; None for a network without horizons
    rule: str = "boundary"  # visibility of the memory
    paper: str = ""  # the paper's name for it
    published: tuple[float, float, int] | None = None  # best perplexity, peak GPU GB, tokens/s (arXiv 2602.19816)
    windows: bool = False  # trained on isolated windows of `WINDOW_SEGMENTS` segments


VARIANTS = {
    "full": Variant(
        "horizons/full",
        "every layer at the full horizon",
        lambda sizes: (sizes.full_horizon,) * sizes.num_layers,
        paper="full-memory Transformer-XL reference",
        published=(5.98, 15.5, 7618),
    ),
    "perceiver_ar": Variant(
        "backbone/perceiver_ar",
        "one cross-attention to a prefix of token ids",
        None,
        paper="Perceiver-AR-like reference",
        published=(6.54, 6.3, 11753),
    ),
    "two_scale": Variant(
        "horizons/two_scale",
        "long horizons in the lowest layers, short ones above",
        lambda sizes: sizes.spend(sizes.two_scale()),
        paper="two-scale DSMR (final)",
        published=(5.96, 6.3, 10339),
    ),
    "binary_sliding": Variant(
        "horizons/binary_sliding",
        "`binary` with sliding windows",
        lambda sizes: sizes.spend(sizes.binary()),
        rule="sliding",
        paper="selective retention DSMR (sliding-window)",
        published=(6.51, 7.8, 11061),
    ),
    "ascending": Variant(
        "horizons/ascending",
        "horizons that grow towards the top",
        lambda sizes: sizes.spend(Ascending(sizes.block, sizes.longest, block=sizes.block)),
        paper="progressive ascending DSMR",
        published=(6.15, 7.0, 10540),
    ),
    "binary": Variant(
        "horizons/binary",
        "a few layers keep a long horizon, the others nothing",
        lambda sizes: sizes.spend(sizes.binary()),
    ),
    "descending": Variant(
        "horizons/descending",
        "horizons that shrink towards the top",
        lambda sizes: sizes.spend(Descending(sizes.block, sizes.longest, block=sizes.block)),
    ),
    "uniform": Variant("horizons/uniform", "an equal share for every layer", lambda sizes: sizes.spend(Uniform())),
    "two_scale_upper": Variant(
        "horizons/two_scale_upper",
        "`two_scale` with its long layers at the top",
        lambda sizes: sizes.spend(sizes.two_scale("upper")),
    ),
    "two_scale_interleaved": Variant(
        "horizons/two_scale_interleaved",
        "`two_scale` with its long layers spread evenly",
        lambda sizes: sizes.spend(sizes.two_scale("interleaved")),
    ),
    "two_scale_whole": Variant(
        "horizons/two_scale_whole",
        "`two_scale` at the budget of `full`",
        lambda sizes: sizes.spend(sizes.two_scale(), sizes.full_horizon * sizes.num_layers),
    ),
    "memoryless": Variant("horizons/memoryless", "no memory in any layer", lambda sizes: (0,) * sizes.num_layers),
    "windowed": Variant(
        "data/windowed",
        "isolated, shuffled windows without memory",
        lambda sizes: (0,) * sizes.num_layers,
        windows=True,
    ),
}
"""All variants by name, in the order of the tables: the paper's five first."""


@dataclass(frozen=True)
class Row:
    """A network of the benchmark."""

    horizons: tuple[int, ...] | None  # bottom to top; None for the Perceiver
    rule: str = "boundary"  # visibility of the memory
    windows: bool = False  # trained on isolated windows of `WINDOW_SEGMENTS` segments, with fewer lanes


def variant_rows(sizes: VariantSizes) -> tuple[dict[str, Row], dict[str, str]]:
    """Return every variant at the given sizes, and the reason for each that cannot be expressed there."""
    rows, absent = {}, {}
    for name, variant in VARIANTS.items():
        try:
            horizons = None if variant.horizons is None else variant.horizons(sizes)
            if horizons is not None and any(horizons):
                check_horizons(horizons, sizes.segment_length, sizes.block)
        except ValueError as error:
            absent[name] = str(error)
        else:
            rows[name] = Row(horizons, variant.rule, variant.windows)
    return rows, absent


def build_network(row: Row, like: Decoder, *, prefix_length: int, **changes: Any) -> Decoder:
    """Build the network of a row with the sizes and options of the network `like`, except for some `changes`."""
    given = vars(like.settings) | changes
    length = like.segment_length * (WINDOW_SEGMENTS if row.windows else 1)
    if row.horizons is None:
        return PerceiverAR(like.vocab_size, length, prefix_length=prefix_length, **given)
    given["memory_block"] = like.memory_block
    return RecurrentTransformer(like.vocab_size, row.horizons, length, rule=row.rule, **given)
