"""Shared parts of all plots: panels, colours and axis labels. Plots need matplotlib, which comes with `dsmr[app]`."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dsmr import UserError
from dsmr.model.horizons import TokenRate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR, LINE, FAINT = "#4477aa", "#cc6677", "#999999"
HEX_CODES = "4477aa cc6677 228833 ccbb44 66ccee aa3377 222222 ee8866 999933 bbbbbb"
COLOURS = [f"#{code}" for code in HEX_CODES.split()]
NO_MATPLOTLIB = "plots need matplotlib: pip install 'dsmr[app]'"


def check_plots() -> None:
    """Raise UserError if matplotlib is missing, before any other work is done."""
    if find_spec("matplotlib") is None:
        raise UserError(NO_MATPLOTLIB)


def make_panels(count: int, height: float, columns: int = 4, *, shared: bool = True) -> tuple["Figure", "list[Axes]"]:
    """Create a figure with `count` panels, each `height` inches high, with `shared` axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(NO_MATPLOTLIB) from error
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(10, height * rows + 0.6), layout="constrained")
    panels: list[Any] = list(figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.tick_params(labelsize=7, labelbottom=True)
    return figure, panels[:count]


def legend_beside(figure: "Figure", axes: "Axes") -> None:
    """Add the legend of `axes` to the right of all panels, where it covers nothing."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False)


def line_style(number: int) -> dict[str, Any]:
    """Return the colour and dashes of a line; the first thirty differ."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3]}


def plain_number(value: float, _: float) -> str:
    """Format a tick as `1,000` or `0.5`."""
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def common_rate(rates: "Sequence[TokenRate | None]") -> TokenRate | None:
    """Return the token rate for a shared axis; None if the rates differ or one is unknown."""
    return rates[0] if rates and all(rate == rates[0] for rate in rates) else None


def token_ticks(rate: TokenRate | None) -> Callable[[float, Any], str]:
    """Return a formatter of token ticks, with seconds of music below if the rate is known."""
    return lambda tokens, _: f"{tokens:,.0f}" + ("" if rate is None else f"\n{rate.seconds(tokens):.0f} s")


def token_unit(rate: TokenRate | None) -> str:
    """Return the unit of a token axis: `tokens`, or `tokens, and seconds of music`."""
    return "tokens" if rate is None else f"tokens, and {rate.label.replace('s of', 'seconds of', 1)}"
