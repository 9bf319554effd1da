"""Find and read results: run folders (`config.yaml`, `metrics.csv`) and JSON documents of `dsmr benchmark`."""

import csv
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dsmr import UserError
from dsmr.model.horizons import TokenRate, format_horizons, parse_horizons, token_rate
from dsmr.results.piece_table import PIECES_FILE, PieceTable
from dsmr.results.run_files import CONFIG_FILE, METRICS_FILE, SECTION_FILE, read_run_section

BENCHMARK_KEYS = {"hardware", "rows", "config", "absent"}


@dataclass
class Run:
    """A training run, read from its folder; what it lacks is None."""

    name: str  # of the folder; its path below the collected folder if several runs share a name
    config: dict[str, Any]  # all settings
    rows: list[dict[str, float]]  # logged values of each row of `metrics.csv`, by column
    metrics: dict[str, Any] = field(default_factory=dict)  # of the best validation, and the last logged performance
    pieces: PieceTable | None = None
    section: dict[str, Any] | None = None  # description of its network, see `dsmr.share.description`
    rate: TokenRate | None = None  # tokens per second of its training music

    @property
    def horizons(self) -> tuple[int, ...] | None:
        """Expanded horizons, bottom to top; None if the run has none or recorded only a schedule's class."""
        if self.section is not None:
            kept = self.section.get("horizons") or self.section["config"].get("horizons")
            return tuple(int(tokens) for tokens in kept) if kept else None
        given = self.config["model"].get("horizons")
        return parse_horizons(given) if isinstance(given, str) else None

    @property
    def rule(self) -> str:
        """Visibility rule."""
        settings = (self.config["model"].get("backbone") or {}).get("init_args") or {}
        return (self.section or settings).get("rule", "boundary")

    @property
    def segment_length(self) -> int:
        """T."""
        return int((self.section or {}).get("segment_length") or self.config["data"].get("segment_length", 512))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step on one process."""
        accumulated = self.config["trainer"].get("accumulate_grad_batches")
        return int(self.config["data"].get("num_lanes", 8)) * self.segment_length * int(accumulated or 1)

    def curve(self, column: str) -> tuple[list[float], list[float]]:
        """Return training tokens and the values logged there; values that are not finite are omitted."""
        points = [(row["step"], row[column]) for row in self.rows if column in row and math.isfinite(row[column])]
        return [(step + 1) * self.tokens_per_step for step, _ in points], [value for _, value in points]


@dataclass(frozen=True)
class ResultCollection:
    """All results of a folder."""

    runs: list[Run]  # best perplexity first
    benchmarks: dict[str, dict[str, Any]]  # by file name
    unread: dict[str, str]  # reasons for files that look like results but cannot be read, by name


def collect_results(folder: Path) -> ResultCollection:
    """Read all runs and benchmark results below a folder; raise UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name one with runs or benchmark files")
    found: dict[str, Run] = {}
    benchmarks, unread = {}, {}
    for path in sorted(folder.rglob(METRICS_FILE)):
        if not (path.parent / CONFIG_FILE).is_file():
            continue
        name = path.parent.relative_to(folder).as_posix()
        try:
            found[name] = read_run(path.parent)
        except Exception as error:  # whatever is wrong with one run, the others are shown
            unread[name] = error_reason(error)
    for path in sorted(folder.rglob("*.json")):
        if path.name == SECTION_FILE:  # belongs to its run
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            unread[path.relative_to(folder).as_posix()] = error_reason(error)
            continue
        if isinstance(content, dict) and content.keys() >= BENCHMARK_KEYS:
            benchmarks[path.relative_to(folder).with_suffix("").as_posix()] = content
    if not found and not benchmarks:
        reasons = "".join(f"; {name}: {reason}" for name, reason in unread.items())
        raise UserError(f"{folder} holds no run (config.yaml and metrics.csv) and no benchmark file{reasons}")
    counts = Counter(run.name for run in found.values())
    for name, run in found.items():
        run.name = name if counts[run.name] > 1 else run.name
    runs = sorted(found.values(), key=lambda run: run.metrics.get("val/perplexity", math.inf))
    return ResultCollection(runs, benchmarks, unread)


def error_reason(error: Exception) -> str:
    """Describe in one line why a file cannot be read."""
    text = " ".join(str(error).split())
    is_clear = isinstance(error, ValueError | OSError | yaml.YAMLError)
    return text if is_clear and text else f"{type(error).__name__}: {text}".rstrip(": ")


def read_run(folder: Path) -> Run:
    """Read a run's folder; UserError if `metrics.csv` is empty or `config.yaml` does not belong to a run."""
    config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    for name in ("model", "data", "trainer"):
        if not isinstance(config, dict) or not isinstance(config.get(name), dict):
            raise UserError(f"{CONFIG_FILE} has no settings of {name}: it does not belong to a run")
    with (folder / METRICS_FILE).open(encoding="utf-8", newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    if not rows:
        raise UserError(f"{METRICS_FILE} is empty: the run logged nothing")
    run = Run(folder.name, config, rows, section=read_run_section(folder))
    run.metrics = _run_metrics(run)
    _ = run.rule, run.segment_length, run.tokens_per_step  # so that bad settings are reported with this run
    run.rate = token_rate(run.section or config["data"])
    if (folder / PIECES_FILE).is_file():
        run.pieces = PieceTable.read(folder / PIECES_FILE)
    return run


def _run_metrics(run: Run) -> dict[str, Any]:
    """Summarize a run: steps, horizons, the best validation, the last performance, and a note on problems."""
    metrics: dict[str, Any] = {"steps": int(max(row["step"] for row in run.rows)) + 1}
    if run.horizons is not None:
        metrics["horizons"] = format_horizons(run.horizons)
    validated = [row for row in run.rows if math.isfinite(row.get("val/perplexity", math.nan))]
    if validated:
        best = min(validated, key=lambda row: row["val/perplexity"])
        metrics |= {key: value for key, value in best.items() if key.startswith("val/")}
    else:
        metrics["note"] = "never validated"
    for row in run.rows:
        metrics |= {key: value for key, value in row.items() if key.startswith("perf/")}
    bad = [row["step"] for row in run.rows if not all(math.isfinite(value) for value in row.values())]
    if bad:
        metrics["note"] = f"not finite from step {int(bad[0])} on"
    return metrics
