"""The schedule that a trained model suggests: memory is taken from where it is missed least, until a budget is met.

Greedy backward elimination: horizons are halved one layer at a time, each time where the loss grows least per token
that becomes free, every step being measured with what was taken before. A layer's loss is measured again only when
it comes first (the lazy greedy algorithm of Minoux, 1978), since what a layer is worth mostly grows as others lose
theirs. What is predicted is measured too: the loss of the same weights with the suggested horizons.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from dsmr import UserError
from dsmr.results.piece_table import PieceTable

Horizons = tuple[int, ...]
Score = Callable[[Horizons], PieceTable]


@dataclass(frozen=True)
class Suggestion:
    """What was found.

    Attributes:
        horizons: suggested, bottom to top.
        trained: those of the model.
        predicted: results by piece of the model's weights with the suggested horizons.
        whole: with its own.
        steps: what was taken, one after another, with nats per note.
        num_evaluations: how many horizons were measured.
    """

    horizons: Horizons
    trained: Horizons
    predicted: PieceTable
    whole: PieceTable
    steps: tuple[tuple[Horizons, float], ...]
    num_evaluations: int


def check_budget(trained: Horizons, budget: int, block: int) -> None:
    """Refuse what `suggest` would refuse, before anything is measured; its arguments are those of `suggest`.

    Raises:
        UserError: a budget that the model's own horizons cannot be cut down to.
    """
    if budget % block or not 0 <= budget <= sum(trained):
        raise UserError(
            f"--budget {budget} must be a multiple of {block} from 0 to {sum(trained)}, which the model was trained "
            "with: what more memory would be worth, it cannot tell"
        )


def half(trained: Horizons, block: int) -> int:
    """Half of what the model has, in whole blocks: a budget to begin with."""
    return sum(trained) // 2 // block * block


def suggest(trained: Horizons, budget: int, block: int, score: Score) -> Suggestion:
    """Horizons that spend a budget to the token, each in whole blocks.

    Args:
        trained: horizons of the model, to take from.
        budget: sum of the suggested horizons.
        block: tokens; divides every horizon.
        score: measures the model with other horizons.

    Raises:
        UserError: a budget that the model's own horizons cannot be cut down to.
    """
    check_budget(trained, budget, block)
    known: dict[Horizons, PieceTable] = {}

    def measured(horizons: Horizons) -> float:
        if horizons not in known:
            known[horizons] = score(horizons)
        return per_note(known[horizons])

    horizons, steps = trained, [(trained, measured(trained))]
    # (loss per freed token, layer, the horizons that it was measured from)
    queue: list[tuple[float, int, Horizons]] = [(float("-inf"), k, ()) for k, h in enumerate(trained) if h]
    while sum(horizons) > budget:
        _, layer, measured_from = heapq.heappop(queue)
        cut = shorter(horizons, layer, block)
        if measured_from != horizons:
            growth = (measured(cut) - steps[-1][1]) / (sum(horizons) - sum(cut))
            heapq.heappush(queue, (growth, layer, horizons))
            continue
        spare = budget - sum(cut)
        if spare > 0:  # the last cut frees more than is needed
            cut = tuple(h + spare * (k == layer) for k, h in enumerate(cut))
        horizons = cut
        steps.append((horizons, measured(horizons)))
        if horizons[layer]:
            heapq.heappush(queue, (float("-inf"), layer, ()))
    return Suggestion(horizons, trained, known[horizons], known[trained], tuple(steps), len(known))


def shorter(horizons: Horizons, layer: int, block: int) -> Horizons:
    """A layer's horizon halved, in whole blocks."""
    half = horizons[layer] // 2 // block * block
    return tuple(half if k == layer else h for k, h in enumerate(horizons))


def per_note(table: PieceTable) -> float:
    """Nats per note; nats per token where there are no notes."""
    under = table.notes_P.sum() or table.tokens_P.sum()
    return float(table.nll_P.sum() / under)
