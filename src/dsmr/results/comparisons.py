"""Compare runs by piece: seeds of one setting are grouped, and groups are paired over pieces."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsmr import UserError
from dsmr.results.bootstrap import Comparison, Interval, compare_tables, missing_interval_note, ratio_interval
from dsmr.results.piece_table import PieceTable, average_tables
from dsmr.results.runs import Run
from dsmr.results.tables import table_lines

SEED = re.compile(r"[,_-]?seed[=_-]?\d+[,_-]?")
IGNORED_DATA_KEYS = ("seed", "cache_dir", "num_workers", "path")
TRAINER_KEYS = ("max_steps", "max_epochs", "precision", "gradient_clip_val", "accumulate_grad_batches", "devices")


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ only in their seeds."""

    name: str  # the runs' common name
    tables: Mapping[str, PieceTable]  # results by piece of each run, by seed
    table: PieceTable  # their mean over the pieces they share

    @property
    def label(self) -> str:
        """The name, with the number of seeds if there are several."""
        return self.name if len(self.tables) == 1 else f"{self.name} ({len(self.tables)} seeds)"

    @property
    def nats_per_note(self) -> float:
        """Nats per note over all pieces."""
        return float(self.table.nll_P.sum() / max(self.table.notes_P.sum(), 1))


@dataclass(frozen=True)
class GroupDifference:
    """A comparison of the means of two groups, and of the seeds that both have."""

    comparison: Comparison
    by_seed: Mapping[str, float]  # nats per note of the first minus those of the second

    def __str__(self) -> str:
        if len(self.by_seed) < 2:
            return str(self.comparison)
        seeds = ", ".join(f"{value:+.3f} ({seed})" for seed, value in self.by_seed.items())
        return f"{self.comparison}; seed by seed {self.comparison.first} has {seeds}"

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        interval = self.comparison.difference
        return {
            "first": self.comparison.first,
            "second": self.comparison.second,
            "nats_per_note": interval.value,
            "low": interval.low,
            "high": interval.high,
            "pieces": self.comparison.num_pieces,
            "first_is_better_on": self.comparison.wins,
            "by_seed": dict(self.by_seed),
        }


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Group runs that have results by piece, fewest nats per note first; a repeated seed counts once."""
    by_setting: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.name):
        if run.pieces is not None:
            by_setting.setdefault(_setting_key(run.config), []).append(run)
    names = [shared_name([run.name for run in members]) for members in by_setting.values()]
    groups = []
    for name, members in zip(names, by_setting.values(), strict=True):
        scored = [(run, _seed_label(run), run.pieces) for run in members if run.pieces is not None]
        own = name if names.count(name) == 1 else members[0].name
        tables: dict[str, PieceTable] = {}
        for _, seed, table in scored:
            tables.setdefault(seed, table)
        try:
            average_tables([table for _, _, table in scored])
        except ValueError:  # no shared piece: each run is its own group
            groups += [RunGroup(run.name, {seed: table}, table) for run, seed, table in scored]
        else:
            groups.append(RunGroup(own, tables, average_tables(list(tables.values()))))
    return sorted(groups, key=lambda group: group.nats_per_note)


def _seed_label(run: Run) -> str:
    """Return the seed of the weights, and of the data if it differs; without a seed, the run's name."""
    weights, data = run.config.get("seed_everything"), run.config["data"].get("seed")
    if isinstance(weights, bool) or weights is None:
        return run.name
    return f"{weights}" if data in (None, weights) else f"{weights}, data {data}"


def _setting_key(config: Mapping[str, Any]) -> str:
    """Return a run's settings without its seeds and its machine."""
    data = {key: value for key, value in config["data"].items() if key not in IGNORED_DATA_KEYS}
    trainer = {key: config["trainer"].get(key) for key in TRAINER_KEYS}
    return json.dumps([config["model"], data, trainer], sort_keys=True, default=str)


def shared_name(names: Sequence[str]) -> str:
    """Return the names' common part without the seed; the first name if the rest differs."""
    if len(names) == 1:
        return names[0]
    rest = {"/".join(filter(None, SEED.sub("", name).split("/"))) for name in names}
    return rest.pop() if len(rest) == 1 and "" not in rest else names[0]


def compare_groups(groups: Sequence[RunGroup], against: str | None = None) -> tuple[list[GroupDifference], list[str]]:
    """Compare every group with the one named `against`, by default the first.

    Returns the differences, and the reasons for groups that cannot be compared. UserError if `against` is unknown.
    """
    by_name = {group.name: group for group in groups}
    if against is not None and against not in by_name:
        raise UserError(f"--against {against}: no such run with pieces.csv; there are {', '.join(by_name) or 'none'}")
    if not groups:
        return [], []
    base = by_name[against] if against is not None else groups[0]
    differences, refused = [], []
    for group in (group for group in groups if group is not base):
        first, second = (base, group) if against is None else (group, base)
        try:
            comparison = compare_tables(first.name, second.name, first.table, second.table)
            differences.append(GroupDifference(comparison, compare_seeds(first, second)))
        except ValueError as error:
            refused.append(str(error))
    return differences, refused


def compare_seeds(first: RunGroup, second: RunGroup) -> dict[str, float]:
    """Return nats per note of the first group minus those of the second, for every seed of both."""
    pairs = {seed: (table, second.tables[seed]) for seed, table in first.tables.items() if seed in second.tables}
    return {seed: compare_tables(first.name, second.name, a, b).difference.value for seed, (a, b) in pairs.items()}


def comparison_table(groups: Sequence[RunGroup], against: str | None = None) -> list[str]:
    """Format all groups as a Markdown table, followed by their differences as of `compare_groups`."""
    differences, refused = compare_groups(groups, against)
    known = groups[0].table.families
    counts_GF = [group.table.tokens_PF.sum(axis=0) for group in groups if group.table.families == known]
    families = [family for family, counts_G in zip(known, zip(*counts_GF, strict=True), strict=True) if any(counts_G)]
    rows = [["run", "pieces", "perplexity", "nats per note", *(f"of which {family}" for family in families)]]
    intervals: list[Interval | None] = [difference.comparison.difference for difference in differences]
    for group in groups:
        table = group.table
        perplexity = ratio_interval(table.nll_P, table.tokens_P, is_exp=True)
        per_note = ratio_interval(table.nll_P, table.notes_P)
        intervals += [perplexity, per_note]
        cells = [group.label, f"{len(table.names):,}", str(perplexity), str(per_note) if per_note else ""]
        shares = table.nll_PF.sum(axis=0) / max(table.notes_P.sum(), 1)
        by_family = dict(zip(table.families, shares, strict=True))
        cells += [f"{by_family[family]:.3f}" if family in by_family else "" for family in families]
        rows.append(cells)
    note = missing_interval_note(intervals)
    lines = [*table_lines(rows), "", "95 % intervals over pieces; variation between seeds is not included."]
    lines += [f"{note[0].upper()}{note[1:]}."] if note else []
    if differences or refused:
        lines += ["Differences are paired over the pieces that both runs share:", ""]
        lines += [f"- {line}" for line in [*differences, *refused]]
    return lines


def comparison_result(groups: Sequence[RunGroup], against: str | None = None) -> dict[str, Any]:
    """Return groups and differences for JSON."""
    differences, refused = compare_groups(groups, against)
    note = missing_interval_note(difference.comparison.difference for difference in differences)
    return {
        "groups": [{"name": one.name, "seeds": len(one.tables), "nats_per_note": one.nats_per_note} for one in groups],
        "differences": [difference.as_dict() for difference in differences],
        "refused": refused,
    } | ({"without_interval": note} if note else {})
