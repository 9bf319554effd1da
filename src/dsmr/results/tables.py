"""Format results as Markdown tables; each function returns a list of lines."""

from collections.abc import Mapping, Sequence
from typing import Any

from dsmr.model.horizons import MAESTRO_RATE
from dsmr.results.runs import Run

Columns = Mapping[str, tuple[str, str]]
"""Header and format of each column, by the key of its value."""
BENCHMARK_COLUMNS: Columns = {
    "horizons": ("horizons", "{}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "relative_to_full": ("x full", "{:.2f}"),
    "saved_mib": ("saved MiB", "{:,.1f}"),
    "state_mib": ("state MiB", "{:,.1f}"),
    "peak_memory_gib": ("peak GiB", "{:.2f}"),
    "parameters": ("parameters", "{:,}"),
    "lanes": ("lanes", "{}"),
    "segment_length": ("T", "{}"),
    "share_of_floor": ("of floor", "{:.0%}"),
    "difference_from_reference": ("differs", "{:.0e}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "nats_per_note": ("nats/note", "{:.2f}"),
}
PIECE_LENGTH_COLUMNS: Columns = {
    "tokens": ("piece length (tokens)", "{:,}"),
    "music": ("minutes of music in MAESTRO", "{:.1f}"),
    "seconds": ("seconds", "{:.2f}"),
    "state_mib": ("state MiB", "{:,.1f}"),
    "peak_memory_gib": ("peak GiB", "{:.2f}"),
    "peak_rss_gib": ("peak RSS GiB, whole process", "{:.2f}"),
}
RUN_COLUMNS: Columns = {
    "horizons": ("horizons", "{}"),
    "steps": ("steps", "{:,}"),
    "val/perplexity": ("best val perplexity", "{:.3f}"),
    "val/nats_per_note": ("nats/note", "{:.3f}"),
    "val/nats_per_second": ("nats/s", "{:.1f}"),
    "perf/tokens_per_second": ("tokens/s", "{:,.0f}"),
    "perf/peak_memory_gib": ("peak GiB", "{:.2f}"),
    "perf/peak_rss_gib": ("peak RSS GiB", "{:.2f}"),
    "perf/saved_mib": ("saved MiB", "{:,.1f}"),
    "perf/state_mib": ("state MiB", "{:,.1f}"),
    "note": ("note", "{}"),
}


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows of cells as a Markdown table; the first row is its header."""
    header, *lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return [header, "|---" * len(rows[0]) + "|", *lines]


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Columns, first: str = "row") -> list[str]:
    """Format one row per mapping, labelled with its `name`; columns that no row has are omitted."""
    shown = [key for key in columns if any(row.get(key) is not None for row in rows)]
    cells = [[first, *(columns[key][0] for key in shown)]]
    for row in rows:
        values = [columns[key][1].format(row[key]) if row.get(key) is not None else "" for key in shown]
        if row.get("out_of_memory"):
            values[0] = "out of memory"
        cells.append([f"`{row['name']}`", *values])
    return table_lines(cells)


def benchmark_table(result: Mapping[str, Any]) -> list[str]:
    """Format a benchmark: its common settings, all rows, omitted rows, and cost by piece length."""
    config, hardware = result["config"], result["hardware"]
    machine = hardware.get("gpu") or f"{hardware['processor'] or hardware['machine']}, {hardware['threads']} threads"
    lines = [
        f"{config['num_layers']} layers of width {config['d_model']}, {config['num_lanes']} lanes of "
        f"{config['segment_length']} tokens per step, {config['precision']}, no dropout, seed "
        f"{config['seed']}; {machine}; commit {result['commit']}",
        "",
        *markdown_table(result["rows"], BENCHMARK_COLUMNS),
        *(f"{name} is left out: {reason}" for name, reason in result["absent"].items()),
    ]
    if result.get("pieces"):
        points = [{"name": curve["name"], **point} for curve in result["pieces"] for point in curve["points"]]
        points = [{"music": MAESTRO_RATE.seconds(point["tokens"]) / 60} | point for point in points]
        lines += ["", *markdown_table(points, PIECE_LENGTH_COLUMNS)]
    return lines


def runs_table(runs: Sequence[Run]) -> list[str]:
    """Format one row per run."""
    return markdown_table([{"name": run.name, **run.metrics} for run in runs], RUN_COLUMNS, first="run")
