"""The worth of each layer's memory: attention by distance, and the loss without that memory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dsmr import UserError
from dsmr.analyze.distances import AttentionDistances
from dsmr.analyze.memory_plots import plot_distances
from dsmr.analyze.streams import score_pieces
from dsmr.data.sources import Split
from dsmr.model.backbone import Backbone, network_name
from dsmr.model.blocks import Decoder
from dsmr.results.bootstrap import Comparison, Interval, compare_tables, missing_interval_note
from dsmr.results.piece_table import PieceTable

Horizons = tuple[int, ...]
ALL = "all"


@dataclass(frozen=True)
class MemoryReport:
    """Results of `analyze_memory`. L layers, H heads, N classes of distances.

    `savings` are nats per note lost without the memory of a layer, by the layer's number, and without any (`all`);
    layers without memory are left out.
    """

    horizons: Horizons  # bottom to top
    segment_length: int  # T
    whole: PieceTable  # results by piece of the network as it is
    savings: dict[str, Comparison]
    starts: tuple[int, ...]  # first distance of each class, in tokens
    shares_LHN: Tensor  # mean share of a query's attention that each class of distances receives
    memory_LH: Tensor  # mean share of a query's attention that memory receives

    def lines(self) -> list[str]:
        """A line for each layer, top to bottom."""
        lines = [
            f"on {len(self.whole.names)} pieces, {self.whole.tokens_P.sum():,.0f} tokens; nats per note that a "
            "layer's memory saves, with 95 % intervals over pieces:"
        ]
        for layer, horizon in reversed(list(enumerate(self.horizons))):
            saved = self.savings.get(str(layer))
            worth = "no memory" if saved is None else f"{saved.difference:+.4f}"
            share = float(self.memory_LH[layer].mean())
            lines.append(f"  layer {layer:<3} horizon {horizon:>7,}  {share:6.1%} of attention to memory  {worth}")
        lines.append(f"  all layers {self.savings[ALL].difference:+.4f}")
        note = missing_interval_note(one.difference for one in self.savings.values())
        return [*lines, f"  ({note})"] if note else lines

    def as_dict(self) -> dict[str, Any]:
        """All results, for JSON; `ablated` has the savings by layer and of all layers."""
        ablated = {name: interval_dict(one.difference) for name, one in self.savings.items()}
        layers = [
            {
                "layer": layer,
                "horizon": horizon,
                "attention_to_memory": self.memory_LH[layer].tolist(),
                "attention_by_distance": self.shares_LHN[layer].tolist(),
                "saved": ablated.get(str(layer)),
            }
            for layer, horizon in enumerate(self.horizons)
        ]
        return {
            "pieces": len(self.whole.names),
            "tokens": int(self.whole.tokens_P.sum()),
            "nats_per_note": nats_per_note(self.whole),
            "distances_from": list(self.starts),
            "layers": layers,
            "all_layers_saved": ablated[ALL],
            "ablated": ablated,
        }

    def plot(self, path: Path) -> None:
        """Plot attention by distance."""
        plot_distances(self.shares_LHN, self.starts, self.horizons, self.segment_length, path)


def analyze_memory(
    backbone: Backbone, data: Any, *, split: Split = "validation", on_pass: Callable[[], object] = lambda: None
) -> MemoryReport:
    """Measure where each layer attends, and evaluate the same weights without the memory of each layer.

    The network is in evaluation mode, on its device; `data` is the datamodule. `on_pass` is called after each of the
    `1 + len(ablated_horizons(backbone.horizons))` passes over the pieces. UserError if the network is not made of
    dsmr's layers or keeps no memory, or the data are isolated windows.
    """
    network = check_layers(backbone)
    if data.windows is not None:
        raise UserError("the run was trained on isolated windows, which have no memory: there is nothing to analyze")
    distances = AttentionDistances(network, max(network.horizons) + network.segment_length)
    with distances.watching():
        whole = score_pieces(network, data, split=split, watch=distances.watch)
    on_pass()
    without = {}
    for name, horizons in ablated_horizons(network.horizons).items():
        without[name] = score_pieces(network, data, split=split, horizons=horizons)
        on_pass()
    savings, shares = memory_savings(whole, without), (distances.shares(), distances.memory_shares())
    return MemoryReport(network.horizons, network.segment_length, whole, savings, distances.starts, *shares)


def check_layers(backbone: Backbone) -> Decoder:
    """Return the network; raise UserError if it is not made of dsmr's layers, or keeps no memory."""
    if not isinstance(backbone, Decoder):
        raise UserError(
            f"{network_name(type(backbone))} is not made of dsmr's layers, whose attention is analyzed; derive "
            "the network from dsmr.model.RecurrentTransformer"
        )
    if not any(backbone.horizons):
        raise UserError("the model keeps no memory by layer: there is nothing to analyze; use one with horizons")
    return backbone


def ablated_horizons(horizons: Horizons) -> dict[str, Horizons]:
    """Horizons without the memory of one layer, by the layer's number (0 is the bottom), and without any (`all`)."""
    kept = [layer for layer, horizon in enumerate(horizons) if horizon]
    without = {str(k): tuple(0 if layer == k else h for layer, h in enumerate(horizons)) for k in kept}
    return without | {ALL: (0,) * len(horizons)}


def memory_savings(whole: PieceTable, without: dict[str, PieceTable]) -> dict[str, Comparison]:
    """Nats per note lost without a memory, paired over pieces."""
    return {name: compare_tables(f"without {name}", "with memory", table, whole) for name, table in without.items()}


def nats_per_note(table: PieceTable) -> float:
    """Nats per note over all pieces; per token if the pieces have no notes."""
    return float(table.nll_P.sum() / (table.notes_P.sum() or table.tokens_P.sum()))


def interval_dict(interval: Interval) -> dict[str, Any]:
    """An interval, for JSON."""
    return {"value": interval.value, "low": interval.low, "high": interval.high, "pieces": interval.num_pieces}
