"""Which runs are better: paired over pieces, seeds of one setting taken together."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsmr import UserError
from dsmr.results.piece_table import Comparison, Interval, PieceTable, average, compare, ratio, why_without
from dsmr.results.runs import Run

SEED = re.compile(r"[,_-]?seed[=_-]?\d+[,_-]?")
NO_SETTING = ("seed", "cache_dir", "num_workers", "path")
TRAINER = ("max_steps", "max_epochs", "precision", "gradient_clip_val", "accumulate_grad_batches", "devices")


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone.

    Attributes:
        name: what their names share.
        tables: results by piece of each, by its seed.
        table: their mean, on the pieces that all were scored on.
    """

    name: str
    tables: Mapping[str, PieceTable]
    table: PieceTable

    @property
    def label(self) -> str:
        """The name, and how many seeds."""
        return self.name if len(self.tables) == 1 else f"{self.name} ({len(self.tables)} seeds)"


@dataclass(frozen=True)
class Difference:
    """A comparison of two groups, and of their seeds.

    Attributes:
        comparison: of their means.
        by_seed: nats per note that the first has more than the second, of every seed that both have.
    """

    comparison: Comparison
    by_seed: Mapping[str, float]

    def __str__(self) -> str:
        if len(self.by_seed) < 2:
            return str(self.comparison)
        seeds = ", ".join(f"{value:+.3f} ({seed})" for seed, value in self.by_seed.items())
        return f"{self.comparison}; seed by seed {self.comparison.first} has {seeds}"


def groups(runs: Sequence[Run]) -> list[Group]:
    """Groups of the runs that have results by piece, fewest nats per note first; a seed of a group counts once."""
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.name):
        if run.pieces is not None:
            found.setdefault(setting(run.config), []).append(run)
    names = [shared_name([run.name for run in members]) for members in found.values()]
    made = []
    for name, members in zip(names, found.values(), strict=True):
        scored = [(run, seed(run), run.pieces) for run in members if run.pieces is not None]
        own = name if names.count(name) == 1 else members[0].name
        tables: dict[str, PieceTable] = {}
        for _, key, table in scored:
            tables.setdefault(key, table)
        try:
            average([table for _, _, table in scored])
        except ValueError:  # scored on different pieces: every one for itself
            made += [Group(run.name, {key: table}, table) for run, key, table in scored]
        else:
            made.append(Group(own, tables, average(list(tables.values()))))
    return sorted(made, key=lambda group: group.table.nll_P.sum() / max(group.table.notes_P.sum(), 1))


def seed(run: Run) -> str:
    """Of a run's weights, and of its data where that differs; the run's name where it was given none."""
    of_weights, of_data = run.config.get("seed_everything"), run.config["data"].get("seed")
    if isinstance(of_weights, bool) or of_weights is None:
        return run.name
    return f"{of_weights}" if of_data in (None, of_weights) else f"{of_weights}, data {of_data}"


def setting(config: Mapping[str, Any]) -> str:
    """What a run was, but for its seeds and where it ran."""
    data = {key: value for key, value in config["data"].items() if key not in NO_SETTING}
    trainer = {key: config["trainer"].get(key) for key in TRAINER}
    return json.dumps([config["model"], data, trainer], sort_keys=True, default=str)


def shared_name(names: Sequence[str]) -> str:
    """A name without the seed, where all agree on the rest; else the first one's."""
    if len(names) == 1:
        return names[0]
    rest = {"/".join(filter(None, SEED.sub("", name).split("/"))) for name in names}
    return rest.pop() if len(rest) == 1 and "" not in rest else names[0]


def differences(found: Sequence[Group], against: str | None = None) -> tuple[list[Difference], list[str]]:
    """Every group against one, by default the best; and why others cannot be compared.

    Raises:
        UserError: there is no group of that name.
    """
    by_name = {group.name: group for group in found}
    if against is not None and against not in by_name:
        raise UserError(f"--against {against}: no such run with pieces.csv; there are {', '.join(by_name) or 'none'}")
    if not found:
        return [], []
    base = by_name[against] if against is not None else found[0]
    made, refused = [], []
    for group in found:
        if group is base:
            continue
        pair = (base, group) if against is None else (group, base)
        try:
            comparison = compare(pair[0].name, pair[1].name, pair[0].table, pair[1].table)
            made.append(Difference(comparison, by_seed(*pair)))
        except ValueError as error:
            refused.append(str(error))
    return made, refused


def by_seed(first: Group, second: Group) -> dict[str, float]:
    """Nats per note of the first less the second's, of every seed that both have."""
    pairs = {key: (table, second.tables[key]) for key, table in first.tables.items() if key in second.tables}
    return {key: compare(first.name, second.name, a, b).difference.value for key, (a, b) in pairs.items()}


def paired_lines(found: Sequence[Group], against: str | None = None) -> list[str]:
    """A table of all groups with intervals, nats per note by family of tokens, and who is better.

    Raises:
        UserError: there is no group of the name to compare with.
    """
    told, refused = differences(found, against)
    header = ["run", "pieces", "perplexity", "nats per note"]
    families = [
        family
        for f, family in enumerate(found[0].table.families)
        if any(g.table.families == found[0].table.families and g.table.tokens_PF[:, f].sum() for g in found)
    ]
    header += [f"of which {family}" for family in families]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    intervals: list[Interval | None] = [difference.comparison.difference for difference in told]
    for group in found:
        table = group.table
        perplexity, per_note = ratio(table.nll_P, table.tokens_P, is_exp=True), ratio(table.nll_P, table.notes_P)
        intervals += [perplexity, per_note]
        cells = [group.label, f"{len(table.names):,}", str(perplexity), str(per_note) if per_note else ""]
        notes = table.notes_P.sum()
        shares = dict(zip(table.families, table.nll_PF.sum(axis=0) / max(notes, 1), strict=True))
        cells += [f"{shares[family]:.3f}" if family in shares else "" for family in families]
        lines.append("| " + " | ".join(cells) + " |")
    why = why_without(intervals)
    lines += ["", "95 % intervals over pieces; they do not include what another seed would change."]
    lines += [f"{why[0].upper()}{why[1:]}."] if why else []
    if told or refused:
        lines += ["Differences are paired over the pieces that both were scored on:", ""]
        lines += [f"- {line}" for line in [*told, *refused]]
    return lines


def as_result(found: Sequence[Group], against: str | None = None) -> dict[str, Any]:
    """Groups and differences, for JSON."""

    def figure(difference: Difference) -> dict[str, Any]:
        comparison = difference.comparison
        interval = comparison.difference
        return {
            "first": comparison.first,
            "second": comparison.second,
            "nats_per_note": interval.value,
            "low": interval.low,
            "high": interval.high,
            "pieces": comparison.num_pieces,
            "first_is_better_on": comparison.wins,
            "by_seed": dict(difference.by_seed),
        }

    told, refused = differences(found, against)
    why = why_without(difference.comparison.difference for difference in told)
    return {
        "groups": [
            {
                "name": group.name,
                "seeds": len(group.tables),
                "nats_per_note": float(group.table.nll_P.sum() / np.maximum(group.table.notes_P.sum(), 1)),
            }
            for group in found
        ],
        "differences": [figure(difference) for difference in told],
        "refused": refused,
    } | ({"without_interval": why} if why else {})
