"""Plots of schedules: what each layer keeps, and how far back it sees."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dsmr import UserError
from dsmr.attention.visibility import receptive_field
from dsmr.model.horizons import TokenRate, format_horizons
from dsmr.results.plotting import BAR, LINE, common_rate, make_panels, token_ticks, token_unit


@dataclass(frozen=True)
class ScheduleShape:
    """The part of a network that a plot of its schedule shows."""

    horizons: tuple[int, ...]  # tokens, bottom to top
    segment_length: int  # T
    rule: str = "boundary"  # visibility rule
    rate: TokenRate | None = None  # tokens per second of its music; None omits the seconds


def plot_schedules(shapes: Mapping[str, ScheduleShape], path: Path) -> None:
    """Plot the horizon and the receptive field of every layer, one panel per named schedule."""
    figure, panels = make_panels(len(shapes), height=2.3)
    rate = common_rate([shape.rate for shape in shapes.values()])
    fields: dict[str, tuple[int, ...]] = dict.fromkeys(shapes, ())
    for name, shape in shapes.items():
        with suppress(UserError):  # a rule of a user's own that cannot be imported here
            fields[name] = receptive_field(shape.horizons, shape.segment_length, shape.rule)
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
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def shorten_spelling(spelling: str) -> str:
    """Abbreviate long horizons to their first two terms and the last."""
    terms = spelling.split("+")
    return spelling if len(spelling) <= 32 else f"{terms[0]}+{terms[1]} ... {terms[-1]}"
