"""`dsmr benchmark`: speed and memory of schedules, baselines and peers, side by side."""

import sys
from typing import Any

from jsonargparse import ArgumentParser

from dsmr.benchmark import Settings
from dsmr.benchmark import run as measure
from dsmr.cli.configs import resolve_configs
from dsmr.cli.generate import OneLine
from dsmr.cli.report import check_output, write_result

COLUMNS = {
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "relative_to_full": ("x full", "{:.2f}"),
    "saved_mib": ("saved MiB", "{:,.0f}"),
    "state_mib": ("state MiB", "{:,.1f}"),
    "peak_memory_gib": ("peak GiB", "{:.2f}"),
    "share_of_floor": ("of floor", "{:.0%}"),
    "difference_from_reference": ("differs", "{:.0e}"),
}


def parser() -> ArgumentParser:
    """Options of the command."""
    made = OneLine(prog="dsmr benchmark", description="Schedules, baselines and peers, side by side in one process.")
    made.add_argument("--config", action="config", help="Options in a YAML file, or a shipped name: benchmark_cpu.")
    made.add_class_arguments(Settings, None)
    made.add_argument("--json", action="store_true", help="The result as JSON on the last line of stdout.")
    made.add_argument("--output", type=str | None, default=None, help="The result as JSON in a file.")
    return made


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr benchmark`."""
    made = parser()
    options = made.parse_args(resolve_configs(arguments)).as_dict()
    output, as_json = check_output(options.pop("output")), options.pop("json")
    options.pop("config", None)
    result = measure(Settings(**options), say=lambda line: print(line, file=sys.stderr, flush=True))
    print(table(result))
    print("next: dsmr benchmark --output benchmark.json keeps the figures")
    write_result(result, as_json=as_json, output=output)
    return 0


def table(result: dict[str, Any]) -> str:
    """All rows as Markdown; a column that no row has is left out."""
    rows = result["rows"]
    columns = [key for key in COLUMNS if any(key in row for row in rows)]
    lines = ["| row | " + " | ".join(COLUMNS[key][0] for key in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [COLUMNS[key][1].format(row[key]) if key in row else "" for key in columns]
        if row.get("out_of_memory"):
            cells[0] = "out of memory"
        lines.append(f"| `{row['name']}` | " + " | ".join(cells) + " |")
    lines += [f"{name} is left out: {reason}" for name, reason in result["absent"].items()]
    return "\n".join(lines)
