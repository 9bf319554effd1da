"""Pictures of what was configured and measured. They need matplotlib, which comes with `dsmr[app]`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmr.model.horizons import TOKENS_PER_SECOND, Rule, format_horizons, receptive_field

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR, LINE, FAINT = "#4477aa", "#cc6677", "#999999"


@dataclass(frozen=True)
class Depth:
    """What the layers of a network keep.

    Attributes:
        horizons: tokens, bottom to top.
        segment_length: T.
        rule: what a query sees of them.
    """

    horizons: tuple[int, ...]
    segment_length: int
    rule: Rule = "boundary"


def plot_schedules(depths: Mapping[str, Depth], path: Path) -> None:
    """One panel for each schedule: the horizon of every layer, and how far back it sees through those below.

    Args:
        depths: by name.
        path: picture to write; its suffix says which format.

    Raises:
        ValueError: matplotlib is missing.
    """
    figure, panels = grid(len(depths), height=2.3)
    longest = max(max(receptive_field(d.horizons, d.segment_length, d.rule)) for d in depths.values())
    for axes, (name, depth) in zip(panels, depths.items(), strict=True):
        layers = range(len(depth.horizons))
        axes.barh(layers, depth.horizons, color=BAR, label="horizon")
        field = receptive_field(depth.horizons, depth.segment_length, depth.rule)
        axes.plot(field, layers, "o-", color=LINE, markersize=3, linewidth=1, label="receptive field")
        axes.set_xscale("symlog", base=2, linthresh=depth.segment_length / 4)
        axes.set_xlim(0, 1.5 * max(longest, 1))
        axes.set_xticks([depth.segment_length * 4**k for k in range(5) if depth.segment_length * 4**k <= 2 * longest])
        axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}\n{tokens / TOKENS_PER_SECOND:.0f} s")
        axes.set_yticks([0, len(depth.horizons) - 1], ["bottom", "top"])
        axes.set_title(f"{name}\n{shortened(format_horizons(depth.horizons))}", fontsize=8)
    figure.supxlabel("tokens before the segment, and seconds of music", fontsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=150)


def plot_recall(
    perplexities: Mapping[str, Mapping[int, float]], reaches: Mapping[str, Sequence[int]], chance: int, path: Path
) -> None:
    """One panel for each model: perplexity of the answers by distance in tokens.

    Args:
        perplexities: by name and distance.
        reaches: by name: tokens that a question surely sees through one layer, and at most through all of them.
        chance: perplexity of guessing.
        path: picture to write.

    Raises:
        ValueError: matplotlib is missing.
    """
    figure, panels = grid(len(perplexities), height=1.9)
    for axes, (name, by_distance) in zip(panels, perplexities.items(), strict=True):
        distances = sorted(by_distance)
        direct, deep = reaches[name]
        axes.axhline(chance, color=FAINT, linewidth=0.8, linestyle=":")
        axes.axvspan(0, min(direct, max(distances) + 40), color=BAR, alpha=0.2, linewidth=0)
        axes.axvline(deep, color=FAINT, linewidth=0.8, linestyle="--")
        axes.plot(distances, [by_distance[d] for d in distances], "o-", color=LINE, markersize=3, linewidth=1)
        axes.set_yscale("log")
        axes.set_ylim(0.9, 24)
        axes.set_yticks([1, 4, chance], ["1", "4", str(chance)])
        axes.minorticks_off()
        axes.set_xlim(0, max(distances) + 40)
        axes.set_title(name, fontsize=8)
    figure.supxlabel("distance in tokens", fontsize=9)
    figure.supylabel("perplexity of the answers", fontsize=9)
    figure.savefig(path, dpi=150)


def grid(count: int, height: float) -> tuple["Figure", "list[Axes]"]:
    """A figure with so many panels of `height` inches, four in a row, with common axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'dsmr[app]'") from error
    rows = -(-count // 4)
    figure = Figure(figsize=(10, height * rows + 0.6), layout="constrained")
    panels: list[Any] = list(figure.subplots(rows, 4, sharex=True, sharey=True, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.tick_params(labelsize=7, labelbottom=True)
    return figure, panels[:count]


def shortened(spelling: str, limit: int = 32) -> str:
    """A long spelling of horizons by its ends."""
    terms = spelling.split("+")
    return spelling if len(spelling) <= limit else f"{terms[0]}+{terms[1]} ... {terms[-1]}"
