"""Finding and reading results: runs (`config.yaml` and `metrics.csv` in a folder) and JSON files of the benchmark."""

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dsmr import UserError
from dsmr.model.horizons import Rule, TokenRate, format_horizons, parse_horizons, token_rate
from dsmr.results import piece_table as pieces
from dsmr.results.piece_table import PieceTable
from dsmr.results.run_files import CONFIG_FILE, METRICS_FILE, SECTION_FILE, read_run_section

PERFORMANCE = "perf/"


@dataclass
class Run:
    """A training run as its folder has it.

    Attributes:
        name: of its folder; its path below what was collected, where others end alike.
        config: all settings.
        rows: of `metrics.csv`, by column, what was not logged left out.
        figures: of the best validation, and performance as last logged.
        pieces: results by piece, where the run has them.
        section: what the run itself kept of its network, see `checkpoint.describe`; None where it kept nothing.
        rate: tokens in a second of the music that it was trained on; None if it is not known.
    """

    name: str
    config: dict[str, Any]
    rows: list[dict[str, float]]
    figures: dict[str, Any] = field(default_factory=dict)
    pieces: PieceTable | None = None
    section: dict[str, Any] | None = None
    rate: TokenRate | None = None

    @property
    def horizons(self) -> tuple[int, ...] | None:
        """Expanded, bottom to top, as the run kept them; None if it has none, or kept only a schedule's class."""
        if self.section is not None:
            kept = self.section.get("horizons") or self.section["config"].get("horizons")
            return tuple(int(tokens) for tokens in kept) if kept else None
        given = self.config["model"].get("horizons")
        return parse_horizons(given) if isinstance(given, str) else None

    @property
    def rule(self) -> Rule:
        """What a query sees."""
        settings = (self.config["model"].get("backbone") or {}).get("init_args") or {}
        rule: Rule = (self.section or settings).get("rule", "boundary")
        return rule

    @property
    def segment_length(self) -> int:
        """T."""
        return int((self.section or {}).get("segment_length") or self.config["data"].get("segment_length", 512))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, of one process."""
        lanes, accumulated = (
            self.config["data"].get("num_lanes", 8),
            self.config["trainer"].get("accumulate_grad_batches"),
        )
        return int(lanes) * self.segment_length * int(accumulated or 1)

    def curve(self, column: str) -> tuple[list[float], list[float]]:
        """Tokens seen, and what was logged then; numbers that are not finite are left out."""
        points = [(row["step"], row[column]) for row in self.rows if column in row and math.isfinite(row[column])]
        return [(step + 1) * self.tokens_per_step for step, _ in points], [value for _, value in points]


@dataclass(frozen=True)
class Collection:
    """All that a folder holds.

    Attributes:
        runs: best perplexity first.
        benchmarks: by file name.
        unread: files that look like results but cannot be read, with the reason.
    """

    runs: list[Run]
    benchmarks: dict[str, dict[str, Any]]
    unread: dict[str, str]


def collect(folder: Path) -> Collection:
    """Read all results under a folder.

    Raises:
        UserError: no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name one with runs or benchmark files")
    found: dict[str, Run] = {}
    benchmarks, unread = {}, {}
    for path in sorted(folder.rglob(METRICS_FILE)):
        if not (path.parent / CONFIG_FILE).is_file():
            continue
        try:
            found[path.parent.relative_to(folder).as_posix()] = read_run(path.parent)
        except Exception as error:  # whatever is wrong with one run, the others are shown
            unread[str(path.parent.relative_to(folder))] = reason(error)
    for path in sorted(folder.rglob("*.json")):
        if path.name == SECTION_FILE:  # read with its run
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            unread[str(path.relative_to(folder))] = reason(error)
            continue
        if isinstance(content, dict) and {"hardware", "rows", "config", "absent"} <= content.keys():
            benchmarks[str(path.relative_to(folder).with_suffix(""))] = content
    runs = apart(found)
    if not runs and not benchmarks:
        reasons = "".join(f"; {name}: {reason}" for name, reason in unread.items())
        raise UserError(f"{folder} holds no run (config.yaml and metrics.csv) and no benchmark file{reasons}")
    runs.sort(key=lambda run: run.figures.get("val/perplexity", math.inf))
    return Collection(runs, benchmarks, unread)


def reason(error: Exception) -> str:
    """One line on why something cannot be read."""
    text = " ".join(str(error).split())
    known = isinstance(error, ValueError | OSError | yaml.YAMLError)
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")


def apart(found: Mapping[str, Run]) -> list[Run]:
    """Runs by their paths, no two of which have the same name."""
    ends = Counter(run.name for run in found.values())
    for path, run in found.items():
        if ends[run.name] > 1:
            run.name = path
    return list(found.values())


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: its metrics are empty, or its settings are not those of a run.
    """
    config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    for name in ("model", "data", "trainer"):
        if not isinstance(config, dict) or not isinstance(config.get(name), dict):
            raise UserError(f"{CONFIG_FILE} has no settings of {name}: it is not that of a run")
    with (folder / METRICS_FILE).open(encoding="utf-8", newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    if not rows:
        raise UserError(f"{METRICS_FILE} is empty: the run logged nothing")
    run = Run(folder.name, config, rows, section=read_run_section(folder))
    run.figures = figures(run)
    _ = run.rule, run.segment_length, run.tokens_per_step  # what is wrong with them is told here
    run.rate = token_rate(run.section or config["data"])
    if (folder / pieces.NAME).is_file():
        run.pieces = PieceTable.read(folder / pieces.NAME)
    return run


def figures(run: Run) -> dict[str, Any]:
    """The row of a run's table."""
    horizons = run.horizons
    found: dict[str, Any] = {"steps": int(max(row["step"] for row in run.rows)) + 1}
    if horizons is not None:
        found["horizons"] = format_horizons(horizons)
    scored = [row for row in run.rows if math.isfinite(row.get("val/perplexity", math.nan))]
    if scored:
        found |= {k: v for k, v in min(scored, key=lambda row: row["val/perplexity"]).items() if k.startswith("val/")}
    else:
        found["note"] = "never validated"
    for row in run.rows:
        found |= {key: value for key, value in row.items() if key.startswith(PERFORMANCE)}
    bad = [row["step"] for row in run.rows if not all(math.isfinite(value) for value in row.values())]
    if bad:
        found["note"] = f"not finite from step {int(bad[0])} on"
    return found
