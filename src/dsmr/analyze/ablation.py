"""What each layer's memory saves: the same weights, evaluated with a layer's memory taken away."""

from collections.abc import Callable
from typing import Any

from dsmr import UserError
from dsmr.results.bootstrap import Comparison, compare_tables
from dsmr.results.piece_table import PieceTable
from dsmr.training.module import RecurrentLM

ALL = "all"
WHOLE = "with memory"


def variants(horizons: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Horizons without the memory of one layer, by the layer's number, 0 being the bottom; and without any.

    Raises:
        UserError: there is no memory that could be taken away.
    """
    kept = [layer for layer, horizon in enumerate(horizons) if horizon]
    if not kept:
        raise UserError("this model keeps no memory, so that none can be taken away; leave out --ablate")
    without = {str(k): tuple(0 if layer == k else h for layer, h in enumerate(horizons)) for k in kept}
    return without | {ALL: (0,) * len(horizons)}


def ablations(model: RecurrentLM, evaluate: Callable[[], Any]) -> dict[str, PieceTable]:
    """Results by piece without the memory of one layer, and without any.

    Args:
        model: whose horizons are changed, and changed back.
        evaluate: evaluates it, so that it has a `piece_table`.

    Raises:
        UserError: a network without horizons, or without memory.
    """
    found = {}
    for name, horizons in variants(model.backbone.horizons).items():
        with model.backbone.remembering(horizons):
            evaluate()
        assert model.piece_table is not None
        found[name] = model.piece_table
    return found


def savings(whole: PieceTable, without: dict[str, PieceTable]) -> dict[str, Comparison]:
    """Nats per note that are lost without a memory, paired over pieces."""
    return {name: compare_tables(f"without {name}", WHOLE, table, whole) for name, table in without.items()}
