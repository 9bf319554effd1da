"""Suggest a schedule: shorten the horizons of a trained model where that costs least, until they meet a budget.

Greedy backward elimination halves one layer's horizon at a time, each time the one whose loss grows least per freed
token, measured with all earlier cuts in place. A layer is measured again only when it comes first in the queue (the
lazy greedy algorithm of Minoux, 1978), since a layer's worth mostly grows as other layers lose their memory. The
result is measured too: the loss of the same weights with the suggested horizons.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsmr import UserError
from dsmr.analyze.layers import Horizons, interval_dict, nats_per_note
from dsmr.model.horizons import format_horizons
from dsmr.results.bootstrap import Comparison, Interval, compare_tables, ratio_interval
from dsmr.results.piece_table import PIECES_FILE, PieceTable
from dsmr.share.loading import find_checkpoint, load_model

SAME_PIECES = "chosen on these same pieces"


@dataclass(frozen=True)
class Suggestion:
    """Result of `suggest_horizons`."""

    horizons: Horizons  # suggested, bottom to top
    trained: Horizons  # those of the model
    predicted: PieceTable  # results by piece of the model's weights with the suggested horizons
    whole: PieceTable  # results by piece with its own horizons
    steps: tuple[tuple[Horizons, float], ...]  # horizons after each cut, with nats per note
    num_evaluations: int  # number of horizons that were measured

    @property
    def budget(self) -> int:
        """Sum of the suggested horizons."""
        return sum(self.horizons)

    @property
    def lost(self) -> Interval:
        """Nats per note lost by the suggested horizons, without training with them."""
        return compare_tables("suggested", "own", self.predicted, self.whole).difference

    def lines(self) -> list[str]:
        """The suggestion, and its predicted cost."""
        predicted, own = nats_per_note(self.predicted), nats_per_note(self.whole)
        return [
            f"suggested for {self.budget:,} tokens, after {self.num_evaluations} measurements: "
            f"{format_horizons(self.horizons)}",
            f"  predicted {predicted:.4f} nats per note (these weights with those horizons, {SAME_PIECES}), "
            f"{self.lost:+.4f} against {own:.4f} with its own",
        ]

    def as_dict(self) -> dict[str, Any]:
        """All results, for JSON."""
        return {
            "suggested": format_horizons(self.horizons),
            "budget": self.budget,
            "predicted_nats_per_note": nats_per_note(self.predicted),
            "lost": interval_dict(self.lost),
            "steps": [{"horizons": format_horizons(h), "nats_per_note": nats} for h, nats in self.steps],
        }

    def overlay(self) -> str:
        """The suggestion as a YAML config for training."""
        return (
            f"# Suggested by dsmr analyze for a budget of {self.budget:,} tokens, from a model trained with\n"
            f"# {format_horizons(self.trained)}: {nats_per_note(self.predicted):.4f} nats per note with these "
            f"horizons and its own weights,\n# {nats_per_note(self.whole):.4f} with its own horizons; {SAME_PIECES}.\n"
            f"model: {{horizons: {format_horizons(self.horizons)}}}\n"
        )


@dataclass(frozen=True)
class SuggestedRun:
    """A run that was trained with suggested horizons, and its results by piece."""

    name: str
    horizons: Horizons
    table: PieceTable

    @classmethod
    def read(cls, given: str) -> "SuggestedRun":
        """Read a run folder; raises UserError if there is none, or if it has no results by piece."""
        found = find_checkpoint(given)
        folder = found if found.is_dir() else found.parent
        path = folder / PIECES_FILE
        if not path.is_file():
            remedy = f"write it with dsmr validate --checkpoint {folder}"
            raise UserError(f"--trained {given} has no {PIECES_FILE}; {remedy}")
        return cls(folder.name, load_model(given).backbone.horizons, PieceTable.read(path))


@dataclass(frozen=True)
class Verification:
    """A suggestion compared with a run trained with it; `not_compared` is the reason if that is impossible."""

    name: str
    measured: Interval | None = None
    comparison: Comparison | None = None
    not_compared: str | None = None

    def lines(self) -> list[str]:
        """The comparison, or why there is none."""
        if self.not_compared:
            return [f"  not compared: {self.not_compared}"]
        return [f"  measured, trained as {self.name}: {self.measured} nats per note; {self.comparison}"]

    def as_dict(self) -> dict[str, Any]:
        """The comparison, for JSON."""
        if self.measured is None or self.comparison is None:
            return {"not_compared": self.not_compared}
        difference = interval_dict(self.comparison.difference)
        return {"measured": interval_dict(self.measured), "measured_less_predicted": difference}


def check_budget(trained: Horizons, budget: int, block: int) -> None:
    """Raise UserError if the horizons cannot be cut down to this budget."""
    if budget % block or not 0 <= budget <= sum(trained):
        raise UserError(
            f"--budget {budget} must be a multiple of {block} from 0 to {sum(trained)}, the model's own budget: the "
            "worth of more memory cannot be measured"
        )


def half_budget(trained: Horizons, block: int) -> int:
    """Half of the model's budget, rounded down to a multiple of `block`."""
    return sum(trained) // 2 // block * block


def suggest_horizons(
    trained: Horizons, budget: int, block: int, score: Callable[[Horizons], PieceTable]
) -> Suggestion:
    """Find horizons, multiples of `block`, whose sum is exactly a budget; `score` evaluates the model with others."""
    check_budget(trained, budget, block)
    known: dict[Horizons, PieceTable] = {}

    def loss(horizons: Horizons) -> float:
        if horizons not in known:
            known[horizons] = score(horizons)
        return nats_per_note(known[horizons])

    horizons, steps = trained, [(trained, loss(trained))]
    # (loss per freed token, layer, the horizons from which it was measured)
    queue: list[tuple[float, int, Horizons]] = [(float("-inf"), k, ()) for k, h in enumerate(trained) if h]
    while sum(horizons) > budget:
        _, layer, measured_from = heapq.heappop(queue)
        half = horizons[layer] // 2 // block * block
        cut = (*horizons[:layer], half, *horizons[layer + 1 :])
        if measured_from != horizons:
            growth = (loss(cut) - steps[-1][1]) / (sum(horizons) - sum(cut))
            heapq.heappush(queue, (growth, layer, horizons))
            continue
        spare = max(budget - sum(cut), 0)  # the last cut may free more than the budget asks for
        horizons = (*horizons[:layer], half + spare, *horizons[layer + 1 :])
        steps.append((horizons, loss(horizons)))
        if horizons[layer]:
            heapq.heappush(queue, (float("-inf"), layer, ()))
    return Suggestion(horizons, trained, known[horizons], known[trained], tuple(steps), len(known))


def verify_suggestion(suggestion: Suggestion, run: SuggestedRun) -> Verification:
    """Compare the predicted loss of a suggestion with that of a run trained with it."""
    try:
        if run.horizons != suggestion.horizons:
            own, suggested = format_horizons(run.horizons) or "no horizons", format_horizons(suggestion.horizons)
            raise UserError(f"{run.name} was trained with {own}, suggested is {suggested}")
        comparison = compare_tables(run.name, "predicted", run.table, suggestion.predicted)
    except UserError as error:
        return Verification(run.name, not_compared=str(error))
    shared = run.table.select([name for name in run.table.names if name in set(suggestion.predicted.names)])
    return Verification(run.name, ratio_interval(shared.nll_P, shared.notes_P), comparison)
