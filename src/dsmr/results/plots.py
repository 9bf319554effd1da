"""Pictures of what was configured and measured. They need matplotlib, which comes with `dsmr[app]`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmr import UserError
from dsmr.model.horizons import Rule, TokenRate, format_horizons, receptive_field
from dsmr.results.piece_table import ratio, why_without

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from symusic import Score

    from dsmr.results.runs import Run

MOST_BANDS = 4
BAR, LINE, FAINT = "#4477aa", "#cc6677", "#999999"
GIVEN, MADE = (0.35, 0.35, 0.35), (0.1, 0.2, 0.65)  # red, green, blue
COLOURS = (
    "#4477aa",
    "#cc6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#222222",
    "#ee8866",
    "#999933",
    "#bbbbbb",
)


@dataclass(frozen=True)
class Depth:
    """What the layers of a network keep.

    Attributes:
        horizons: tokens, bottom to top.
        segment_length: T.
        rule: what a query sees of them.
        rate: tokens in a second of its music; None leaves out the seconds.
    """

    horizons: tuple[int, ...]
    segment_length: int
    rule: Rule = "boundary"
    rate: TokenRate | None = None


def plot_schedules(depths: Mapping[str, Depth], path: Path) -> None:
    """One panel for each schedule: the horizon of every layer, and how far back it sees through those below.

    Args:
        depths: by name.
        path: picture to write; its suffix says which format.

    Raises:
        UserError: matplotlib is missing.
    """
    figure, panels = grid(len(depths), height=2.3)
    rate = common_rate([depth.rate for depth in depths.values()])
    longest = max(max(receptive_field(d.horizons, d.segment_length, d.rule)) for d in depths.values())
    for axes, (name, depth) in zip(panels, depths.items(), strict=True):
        layers = range(len(depth.horizons))
        axes.barh(layers, depth.horizons, color=BAR, label="horizon")
        field = receptive_field(depth.horizons, depth.segment_length, depth.rule)
        axes.plot(field, layers, "o-", color=LINE, markersize=3, linewidth=1, label="receptive field")
        axes.set_xscale("symlog", base=2, linthresh=depth.segment_length / 4)
        axes.set_xlim(0, 1.5 * max(longest, 1))
        axes.set_xticks([depth.segment_length * 4**k for k in range(5) if depth.segment_length * 4**k <= 2 * longest])
        axes.xaxis.set_major_formatter(tokens_and_seconds(rate))
        axes.set_yticks([0, len(depth.horizons) - 1], ["bottom", "top"])
        axes.set_title(f"{name}\n{shortened(format_horizons(depth.horizons))}", fontsize=8)
    figure.supxlabel(f"tokens before the segment{and_seconds(rate)}", fontsize=9)
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
        UserError: matplotlib is missing.
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


def plot_piano_roll(score: "Score", path: Path, *, title: str = "", seam: float | None = None) -> None:
    """Notes over time, the louder the darker, what was given and what was made in two colours; the pedal below.

    Args:
        score: of any time unit.
        path: picture to write.
        title: above it.
        seam: seconds where a prompt ends; None where there is none.

    Raises:
        UserError: matplotlib is missing.
    """
    figure, (axes,) = grid(1, height=2.9, columns=1)
    tracks = score.to("second").tracks
    notes = [note for track in tracks for note in track.notes]
    first = 0.0 if seam is None else seam - 0.005
    parts = [
        ("prompt", GIVEN, [n for n in notes if n.time < first]),
        ("new", MADE, [n for n in notes if n.time >= first]),
    ]
    for name, colour, part in parts:
        axes.barh(
            [note.pitch for note in part],
            [note.duration for note in part],
            left=[note.time for note in part],
            height=0.9,
            color=[(*colour, 0.25 + 0.75 * note.velocity / 127) for note in part],
            label=name if seam is not None else None,
        )
    axes.set_xlabel("seconds", fontsize=8)
    axes.set_yticks([24, 36, 48, 60, 72, 84, 96], ["C1", "C2", "C3", "C4", "C5", "C6", "C7"])
    pitches = [note.pitch for note in notes]
    low, high = min([21, *pitches]) - 1, max([108, *pitches]) + 1
    pedals = [(pedal.time, pedal.duration) for track in tracks for pedal in track.pedals]
    if pedals:
        axes.broken_barh(pedals, (low - 4, 2.5), facecolor=FAINT, label="pedal")
        low -= 5
    axes.set_ylim(low, high)
    axes.set_xlim(0, max([note.time + note.duration for note in notes], default=1.0))
    if seam is not None:
        axes.axvline(seam, color=FAINT, linewidth=0.8, linestyle="--")
    if seam is not None or pedals:
        figure.legend(loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    axes.grid(axis="y", linewidth=0.3, color=FAINT)
    axes.set_title(title, fontsize=9, loc="left")
    figure.savefig(path, dpi=120)


def check_pictures() -> None:
    """Before any work is done for a picture.

    Raises:
        UserError: matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: pip install 'dsmr[app]'")


def grid(count: int, height: float, columns: int = 4, *, shared: bool = True) -> tuple["Figure", "list[Axes]"]:
    """A figure with so many panels of `height` inches, `columns` in a row, with common axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'dsmr[app]'") from error
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(10, height * rows + 0.6), layout="constrained")
    panels: list[Any] = list(figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.tick_params(labelsize=7, labelbottom=True)
    return figure, panels[:count]


def common_rate(rates: "Sequence[TokenRate | None]") -> TokenRate | None:
    """The rate of all that share an axis; None where they differ or one is not known."""
    return rates[0] if rates and all(rate == rates[0] for rate in rates) else None


def tokens_and_seconds(rate: TokenRate | None) -> Callable[[float, Any], str]:
    """How an axis of tokens is labelled: tokens, and seconds of music below them."""
    return lambda tokens, _: f"{tokens:,.0f}" + ("" if rate is None else f"\n{rate.seconds(tokens):.0f} s")


def and_seconds(rate: TokenRate | None) -> str:
    """End of an axis' title."""
    return "" if rate is None else f", and {rate.label.replace('s of', 'seconds of', 1)}"


def shortened(spelling: str, limit: int = 32) -> str:
    """A long spelling of horizons by its ends."""
    terms = spelling.split("+")
    return spelling if len(spelling) <= limit else f"{terms[0]}+{terms[1]} ... {terms[-1]}"


def plot_learning(runs: "Sequence[Run]", path: Path) -> None:
    """Two panels over training tokens: NLL in training, a running mean, and perplexity in validation.

    Args:
        runs: whose curves are drawn.
        path: picture to write.

    Raises:
        UserError: matplotlib is missing.
    """
    figure, panels = grid(2, height=3.4, columns=2, shared=False)
    for number, run in enumerate(runs):
        for axes, column in zip(panels, ("train/nll", "val/perplexity"), strict=True):
            tokens, values = run.curve(column)
            if column == "train/nll":
                values = running_mean(values, 10)
            marker = "o" if column == "val/perplexity" else ""
            axes.plot(tokens, values, marker=marker, markersize=3, linewidth=1, label=run.name, **own_style(number))
    for axes, label in zip(panels, ("NLL in training, nats per token", "validation perplexity"), strict=True):
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("training tokens", fontsize=8)
        axes.xaxis.set_major_formatter(plain_number)
        axes.grid(linewidth=0.3, color=FAINT)
    beside(figure, panels[0])
    figure.savefig(path, dpi=150)


def own_style(number: int) -> dict[str, Any]:
    """Colour and dashes of a run, no two of thirty alike."""
    dashes = ("-", "--", ":")[number // len(COLOURS) % 3]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": dashes}


def beside(figure: "Figure", axes: "Axes") -> None:
    """A legend to the right of all panels, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7, frameon=False)


def plot_positions(runs: "Sequence[Run]", path: Path) -> bool:
    """Perplexity by position in the piece, of each run's best validation; False if no run has it.

    Where a run has results by piece, their intervals are drawn as well, if the runs are few enough to tell apart.

    Args:
        runs: whose figures are drawn.
        path: picture to write.

    Raises:
        UserError: matplotlib is missing.
    """
    prefix, drawn, has_bands = "val/position/perplexity_", False, len(runs) <= MOST_BANDS
    without: str | None = None
    figure, (axes,) = grid(1, height=3.6, columns=1)
    for number, run in enumerate(runs):
        points = sorted((int(k.removeprefix(prefix)), v) for k, v in run.figures.items() if k.startswith(prefix))
        style = own_style(number)
        if run.pieces is not None:  # line and band of the same pieces
            table = run.pieces
            parts = zip(table.starts, table.nll_PK.T, table.tokens_PK.T, strict=True)
            figures = {start: ratio(nll_P, tokens_P, is_exp=True) for start, nll_P, tokens_P in parts}
            known = {start: interval for start, interval in figures.items() if interval is not None}
            points = [(start, interval.value) for start, interval in known.items()]
            if has_bands and known:
                lows, highs = zip(*(interval.ends or (nan, nan) for interval in known.values()), strict=True)
                axes.fill_between(list(known), lows, highs, color=style["color"], alpha=0.12, linewidth=0)
                without = without or why_without(known.values())
        if points:
            drawn = True
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=run.name, **style)
    if not drawn:
        return False
    axes.set_xscale("symlog", base=2, linthresh=128)  # the first stretch begins at 0
    axes.set_xlim(left=-8)
    rate = common_rate([run.rate for run in runs])
    axes.xaxis.set_major_formatter(tokens_and_seconds(rate))
    axes.set_xlabel(f"first token of the stretch{and_seconds(rate)}", fontsize=8)
    axes.set_ylabel("perplexity", fontsize=8)
    axes.grid(linewidth=0.3, color=FAINT)
    if without:
        axes.set_title(without, fontsize=7, color=FAINT)
    beside(figure, axes)
    figure.savefig(path, dpi=150)
    return True


def plot_benchmark(result: Mapping[str, Any], path: Path) -> None:
    """Speed against memory, a point for each training row; its perplexity beside the name where it was measured.

    Args:
        result: of the benchmark.
        path: picture to write.

    Raises:
        UserError: matplotlib is missing.
    """
    figure, (axes,) = grid(1, height=4.6, columns=1)
    rows = [row for row in result["rows"] if row.get("kind") == "training"]
    peak = all("peak_memory_gib" in row for row in rows)
    axes.set_xscale("log")
    axes.set_yscale("log")
    labels = []
    for row in rows:
        place = (row["peak_memory_gib"] if peak else row["saved_and_state_mib"], row["tokens_per_second"])
        is_peer = row["name"].startswith(("x_transformers", "perceiver_ar_pytorch"))
        axes.plot(*place, "s" if is_peer else "o", color=LINE if is_peer else BAR, markersize=5)
        labels.append((place, row["name"] + (f" ({row['perplexity']:.2f})" if "perplexity" in row else "")))
    axes.margins(x=0.25, y=0.1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain_number)
        axis.set_minor_formatter(plain_number)
        axis.set_tick_params(which="both", labelsize=7)
    annotate_apart(axes, labels)
    axes.set_xlabel("peak GiB" if peak else "kept for backward and state, MiB", fontsize=8)
    axes.set_ylabel("tokens per second in training", fontsize=8)
    axes.grid(which="both", linewidth=0.3, color=FAINT)
    figure.savefig(path, dpi=150)


def plot_tradeoff(runs: "Sequence[Run]", path: Path) -> bool:
    """Perplexity against speed, a disc for each run with the area of its memory; False where fewer than two have it.

    Args:
        runs: that were trained on one machine, or their speeds do not compare.
        path: picture to write.

    Raises:
        UserError: matplotlib is missing.
    """
    wanted = ("perf/tokens_per_second", "val/perplexity", "perf/state_mib")
    measured = [run for run in runs if all(run.figures.get(name) is not None for name in wanted)]
    if len(measured) < 2:
        return False
    on_gpu = all("perf/peak_memory_gib" in run.figures for run in measured)
    memory = [memory_mib(run.figures, on_gpu) for run in measured]
    figure, (axes,) = grid(1, height=4.0, columns=1)
    for number, (run, mib) in enumerate(zip(measured, memory, strict=True)):
        place = (run.figures["perf/tokens_per_second"], run.figures["val/perplexity"])
        colour, marker = COLOURS[number % len(COLOURS)], "os^"[number // len(COLOURS) % 3]
        axes.scatter(*place, s=20 + 600 * mib / max(*memory, 1e-9), color=colour, alpha=0.3, linewidths=0)
        axes.plot(*place, marker, color=colour, markersize=4, label=f"{run.name}, {mib:,.0f} MiB")
    axes.margins(x=0.15, y=0.2)
    axes.xaxis.set_major_formatter(plain_number)
    beside(figure, axes)
    axes.set_xlabel("tokens per second in training", fontsize=8)
    axes.set_ylabel("best validation perplexity", fontsize=8)
    axes.set_title(f"area of a disc: {'peak memory' if on_gpu else 'kept for backward and state'}", fontsize=9)
    axes.grid(linewidth=0.3, color=FAINT)
    figure.savefig(path, dpi=150)
    return True


def memory_mib(figures: Mapping[str, Any], on_gpu: bool) -> float:
    """The peak on a GPU; what backward keeps, if that is known, and the state on a CPU."""
    if on_gpu:
        return 1024 * float(figures["perf/peak_memory_gib"])
    return float(figures["perf/state_mib"]) + float(figures.get("perf/saved_mib", 0.0))


def annotate_apart(axes: "Axes", labels: Sequence[tuple[tuple[float, float], str]], size: int = 7) -> None:
    """Write labels to the right of their points, each moved up until it covers no other."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # settles where points lie
    points_per_pixel = 72 / axes.figure.dpi
    taken: list[tuple[float, float, float]] = []  # left, right, bottom, in points
    for place, text in sorted(labels, key=lambda label: label[0][1]):
        x, y = axes.transData.transform(place) * points_per_pixel
        left, right, bottom = x + 6, x + 6 + 0.62 * size * len(text), y - size / 2
        while any(left < ends and begins < right and abs(bottom - low) < size + 1 for begins, ends, low in taken):
            bottom += 1
        taken.append((left, right, bottom))
        axes.annotate(text, place, xytext=(6, bottom - y), textcoords="offset points", fontsize=size)


def plain_number(value: float, _: float) -> str:
    """`1,000` or `0.5`."""
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def plot_pieces(pieces: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Seconds and state against the tokens of a piece.

    Args:
        pieces: curves of the benchmark.
        path: picture to write.

    Raises:
        UserError: matplotlib is missing.
    """
    figure, panels = grid(2, height=3.2, columns=2, shared=False)
    for number, curve in enumerate(pieces):
        tokens = [point["tokens"] for point in curve["points"]]
        for axes, key in zip(panels, ("seconds", "state_mib"), strict=True):
            values = [point[key] for point in curve["points"]]
            axes.plot(tokens, values, "o-", color=COLOURS[number], markersize=3, linewidth=1, label=curve["name"])
    for axes, label in zip(panels, ("seconds to read it", "MiB of state"), strict=True):
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("tokens of a piece", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(linewidth=0.3, color=FAINT)
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and those before it, `width` at most."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
