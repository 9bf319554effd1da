"""Results as Markdown, a list of lines each."""

from collections.abc import Mapping, Sequence
from typing import Any

from dsmr.model.horizons import MAESTRO_RATE
from dsmr.results.runs import Run

Columns = Mapping[str, tuple[str, str]]
BENCHMARK: Columns = {
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
RUNS: Columns = {
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


def markdown(rows: Sequence[Mapping[str, Any]], columns: Columns, first: str = "row") -> list[str]:
    """A table with a row for each mapping, named by its `name`; a column that no row has is left out."""
    shown = [key for key in columns if any(row.get(key) is not None for row in rows)]
    lines = [f"| {first} | " + " | ".join(columns[key][0] for key in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for row in rows:
        cells = [columns[key][1].format(row[key]) if row.get(key) is not None else "" for key in shown]
        if row.get("out_of_memory"):
            cells[0] = "out of memory"
        lines.append(f"| `{row['name']}` | " + " | ".join(cells) + " |")
    return lines


def benchmark_table(result: Mapping[str, Any]) -> list[str]:
    """What was equal, all rows, what was left out, and what pieces took."""
    config, hardware = result["config"], result["hardware"]
    place = hardware.get("gpu") or f"{hardware['processor'] or hardware['machine']}, {hardware['threads']} threads"
    lines = [
        f"{config['num_layers']} layers of width {config['d_model']}, {config['num_lanes']} lanes of "
        f"{config['segment_length']} tokens in every step, {config['precision']}, without dropout, seed "
        f"{config['seed']}; {place}; commit {result['commit']}",
        "",
        *markdown(result["rows"], BENCHMARK),
        *(f"{name} is left out: {reason}" for name, reason in result["absent"].items()),
    ]
    if result.get("pieces"):
        lines += ["", *pieces_table(result["pieces"])]
    return lines


def pieces_table(pieces: Sequence[Mapping[str, Any]]) -> list[str]:
    """Seconds and memory after so many tokens of one piece."""
    rows = [
        {
            "name": curve["name"],
            "music": MAESTRO_RATE.seconds(point["tokens"]) / 60,
            **point,
        }
        for curve in pieces
        for point in curve["points"]
    ]
    columns = {
        "tokens": ("tokens of a piece", "{:,}"),
        "music": ("min of music in MAESTRO", "{:.1f}"),
        "seconds": ("seconds", "{:.2f}"),
        "state_mib": ("state MiB", "{:,.1f}"),
        "peak_memory_gib": ("peak GiB", "{:.2f}"),
        "peak_rss_gib": ("peak RSS GiB, whole process", "{:.2f}"),
    }
    return markdown(rows, columns)


def runs_table(runs: Sequence[Run]) -> list[str]:
    """A row for each run, the best first."""
    rows = [{"name": run.name, **run.figures} for run in runs]
    return markdown(rows, RUNS, first="run")
