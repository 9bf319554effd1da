"""The rows of the paper's table and of ours, at any depth and budget: what the benchmark and the estimate compare.

All but `full`, `two_scale_whole`, `perceiver_ar`, `memoryless` and `windowed` spend the same budget, to the token; a
row that cannot is left out with the reason. At base.yaml's size they are the overlays in `configs/horizons`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsmr.model import Ascending, Binary, Descending, PerceiverAR, RecurrentTransformer, Schedule, TwoScale, Uniform
from dsmr.model.blocks import Decoder
from dsmr.model.horizons import Rule, check_horizons
from dsmr.model.schedules import Placement, expand

FULL_BUDGETS = 4  # how many budgets the full reference has
WINDOW_SEGMENTS = 4  # how many segments an isolated window has


@dataclass(frozen=True)
class Row:
    """A network of the table.

    Attributes:
        horizons: bottom to top; None for the Perceiver, which has none.
        rule: what a query sees of them.
        paper: what the paper calls it, or nothing.
        windows: isolated windows of four segments, a quarter of the lanes at a time.
    """

    horizons: tuple[int, ...] | None
    rule: Rule = "boundary"
    paper: str = ""
    windows: bool = False


def paper_rows(
    num_layers: int, segment_length: int, budget: int, block: int, full_horizon: int | None = None
) -> tuple[dict[str, Row], dict[str, str]]:
    """Rows by name, and why others are left out.

    Args:
        num_layers: L.
        segment_length: T, which is also the short horizon.
        budget: tokens that all layers keep together.
        block: tokens; divides every horizon.
        full_horizon: of every layer of the reference; None means that its budget is four times the others'.
    """
    if full_horizon is None:
        full_horizon = FULL_BUDGETS * budget // num_layers // block * block
    num_long, num_kept = max(1, num_layers // 6), max(1, num_layers // 4)
    shapes: dict[str, tuple[Schedule, int, Rule, str]] = {}

    def add(name: str, shape: Schedule, spent: int = budget, rule: Rule = "boundary", paper: str = "") -> None:
        shapes[name] = shape, spent, rule, paper

    def two_scale(placement: Placement = "lower") -> TwoScale:
        return TwoScale(long=segment_length, short=segment_length, num_long=num_long, placement=placement)

    longest = max(block, 2 * budget // num_layers - block)
    add("two_scale", two_scale(), paper="two-scale DSMR (final)")
    add("binary_sliding", Binary(layers=num_kept), rule="sliding", paper="selective retention DSMR (sliding-window)")
    add("ascending", Ascending(block, longest, block=block), paper="progressive ascending DSMR")
    add("binary", Binary(layers=num_kept))
    add("descending", Descending(block, longest, block=block))
    add("uniform", Uniform())
    add("two_scale_upper", two_scale("upper"))
    add("two_scale_interleaved", two_scale("interleaved"))
    add("two_scale_whole", two_scale(), spent=full_horizon * num_layers)
    rows = {
        "full": Row((full_horizon,) * num_layers, paper="full-memory Transformer-XL reference"),
        "perceiver_ar": Row(None, paper="Perceiver-AR-like reference"),
    }
    absent = {}
    for name, (shape, spent, rule, paper) in shapes.items():
        try:
            horizons = expand(shape.fitted(spent, block), num_layers)
            check_horizons(horizons, segment_length, block)
        except ValueError as error:
            absent[name] = str(error)
        else:
            rows[name] = Row(horizons, rule, paper)
    rows["memoryless"] = Row((0,) * num_layers)
    rows["windowed"] = Row((0,) * num_layers, windows=True)
    return rows, absent


def named_rows(horizons: Mapping[str, str], num_layers: int) -> dict[str, Row]:
    """Rows of given horizons, such as `{two_scale: 2x4096+6x512}`.

    Raises:
        UserError: horizons of another number of layers.
    """
    return {name: Row(expand(text, num_layers)) for name, text in horizons.items()}


def build(row: Row, like: Decoder, *, prefix_length: int, **changes: Any) -> Decoder:
    """The network of a row: the other's sizes and ways to compute, the row's horizons.

    Args:
        row: of the table.
        like: has the sizes; its own horizons do not count.
        prefix_length: of the Perceiver.
        changes: constructor arguments that are to differ.
    """
    given = like.sizes() | like.options() | changes
    length = like.segment_length * (WINDOW_SEGMENTS if row.windows else 1)
    if row.horizons is None:
        return PerceiverAR(like.vocab_size, None, length, prefix_length=prefix_length, **given)
    given["memory_block"] = like.memory_block
    return RecurrentTransformer(like.vocab_size, row.horizons, length, rule=row.rule, **given)
