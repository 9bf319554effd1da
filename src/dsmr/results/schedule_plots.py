"""Plots of schedules: what each layer keeps, how far back it sees, and what models recall."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsmr import UserError
from dsmr.attention.visibility import receptive_field
from dsmr.model.horizons import TokenRate, format_horizons
from dsmr.results.plotting import BAR, FAINT, LINE, common_rate, make_panels, token_ticks, token_unit


@dataclass(frozen=True)
class ScheduleShape:
    """The part of a network that a plot of its schedule shows.

    Attributes:
        horizons: tokens, bottom to top.
        segment_length: T.
        rule: visibility rule.
        rate: tokens per second of its music; None omits the seconds.
    """

    horizons: tuple[int, ...]
    segment_length: int
    rule: str = "boundary"
    rate: TokenRate | None = None


def plot_schedules(shapes: Mapping[str, ScheduleShape], path: Path) -> None:
    """Plot the horizon and the receptive field of every layer, one panel per schedule.

    Args:
        shapes: schedules by name.
        path: output file; its suffix selects the format.

    Raises:
        UserError: matplotlib is missing.
    """
    figure, panels = make_panels(len(shapes), height=2.3)
    rate = common_rate([shape.rate for shape in shapes.values()])
    fields = {name: _receptive_field(shape) for name, shape in shapes.items()}
    longest = max(max(fields[name] or shape.horizons) for name, shape in shapes.items())
    for axes, (name, shape) in zip(panels, shapes.items(), strict=True):
        layers = range(len(shape.horizons))
        axes.barh(layers, shape.horizons, color=BAR, label="horizon")
        if fields[name]:
            axes.plot(fields[name], layers, "o-", color=LINE, markersize=3, linewidth=1, label="receptive field")
        axes.set_xscale("symlog", base=2, linthresh=shape.segment_length / 4)
        axes.set_xlim(0, 1.5 * max(longest, 1))
        axes.set_xticks([shape.segment_length * 4**k for k in range(5) if shape.segment_length * 4**k <= 2 * longest])
        axes.xaxis.set_major_formatter(token_ticks(rate))
        axes.set_yticks([0, len(shape.horizons) - 1], ["bottom", "top"])
        axes.set_title(f"{name}\n{shorten_spelling(format_horizons(shape.horizons))}", fontsize=8)
    figure.supxlabel(f"Distance before the segment ({token_unit(rate)})", fontsize=9)
    figure.supylabel("Layer", fontsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=150)


def shorten_spelling(spelling: str, limit: int = 32) -> str:
    """Abbreviate long horizons to their first two terms and the last."""
    terms = spelling.split("+")
    return spelling if len(spelling) <= limit else f"{terms[0]}+{terms[1]} ... {terms[-1]}"


def plot_recall(
    perplexities: Mapping[str, Mapping[int, float]], reaches: Mapping[str, Sequence[int]], chance: int, path: Path
) -> None:
    """Plot the perplexity of recalled answers by distance, one panel per model.

    Args:
        perplexities: by model name and distance in tokens.
        reaches: by model name: tokens within reach of one layer, and at most of all layers.
        chance: perplexity of guessing.
        path: output file.

    Raises:
        UserError: matplotlib is missing.
    """
    figure, panels = make_panels(len(perplexities), height=1.9)
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
    figure.supxlabel("Distance from the fact to its question (tokens)", fontsize=9)
    figure.supylabel("Answer perplexity (lower is better)", fontsize=9)
    figure.savefig(path, dpi=150)


def _receptive_field(shape: ScheduleShape) -> tuple[int, ...]:
    """Return the receptive field, empty for a rule of a user's own that cannot be imported here."""
    try:
        return receptive_field(shape.horizons, shape.segment_length, shape.rule)
    except UserError:
        return ()
