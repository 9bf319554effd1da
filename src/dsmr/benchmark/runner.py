"""Taking turns: every row is prepared, then all are measured in rounds."""

import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from dsmr import UserError
from dsmr.benchmark.decoding_speed import our_decoding, x_transformers_decoding
from dsmr.benchmark.machine import copy_bandwidth, current_commit, hardware_info, package_versions
from dsmr.benchmark.peers import UnfitError
from dsmr.benchmark.piece_lengths import measure_piece_lengths
from dsmr.benchmark.settings import Workload
from dsmr.benchmark.training_speed import PEERS, Contestant, our_training, peer_training
from dsmr.benchmark.variants import Row
from dsmr.cost import GIB, MIB
from dsmr.cost.measuring import timed

Make = Callable[[], Contestant]
Say = Callable[[str], None]
Judge = Callable[[Workload, Row], dict[str, Any]]


def makers(work: Workload, bandwidth: float, suffix: str = "") -> tuple[dict[str, Make], dict[str, str]]:
    """Every row by name, to be made when its turn comes; and why others are left out."""
    networks, absent = work.known_rows()
    settings = work.settings
    rows: dict[str, Make] = {}
    for name, row in networks.items():
        rows[name + suffix] = partial(our_training, name + suffix, work, row, work.form)
    for name in settings.materialised:
        if name in networks:
            full_name = f"materialised_{name}{suffix}"
            rows[full_name] = partial(our_training, full_name, work, networks[name], "materialised")
        elif settings.horizons is not None:
            raise UserError(f"benchmark.materialised: {name} is not in horizons; known: {', '.join(networks)}")
    if settings.peers:
        for name in PEERS:
            rows[name + suffix] = partial(peer_training, name, name + suffix, work)
    if settings.decode_tokens:
        for lanes in settings.decode_lanes:
            for name, row in networks.items():
                full_name = decoding_name(name, lanes, suffix)
                if not row.windows:
                    rows[full_name] = partial(our_decoding, full_name, work, row, lanes, bandwidth)
        if settings.peers:
            name = "x_transformers_decode" + suffix
            rows[name] = partial(x_transformers_decoding, name, work)
    return rows, absent


def decoding_name(name: str, lanes: int, suffix: str) -> str:
    """Name of a decoding row."""
    return f"{name}_decode" + (f"_{lanes}" if lanes > 1 else "") + suffix


def run(work: Workload, say: Say = lambda line: None, judge: Judge | None = None) -> dict[str, Any]:
    """Measure all rows.

    Args:
        work: what is measured.
        say: is told what is being done.
        judge: trains and validates one of our rows, where `train_tokens` asks for it.

    Returns:
        `{commit, hardware, config, versions, absent, wrong, rows, pieces}`; a row that ran out of memory says so, one
        whose form does not equal the reference is absent, and wrong.

    Raises:
        UserError: a row that is not known.
    """
    measured_commit, settings = current_commit(), work.settings
    bandwidth = copy_bandwidth(work.place)
    precisions: list[str] = [*settings.precisions] or [work.precision]
    known: dict[str, Make] = {}
    for precision in precisions:
        made, absent = makers(work.at(precision), bandwidth, f"@{precision}" if len(precisions) > 1 else "")
        known |= made
    for name in settings.rows:
        if name not in known and name not in absent:
            raise UserError(f"benchmark.rows: {name} is unknown; known: {', '.join(known)}")
    wanted = [name for name in settings.rows or known if name in known]
    contestants, rows, wrong = prepare(wanted, known, absent, say)
    take_turns(contestants, rows, work, say)
    for name, contestant in contestants.items():
        rows[name] = figures(contestant, contestants)
    networks = work.known_rows()[0]
    pieces = []
    for name in ("full", "two_scale"):
        if settings.piece_lengths and name in networks and (not settings.rows or name in settings.rows):
            try:
                pieces.append(measure_piece_lengths(name, work, networks[name], settings.piece_lengths, say))
            except torch.OutOfMemoryError:
                pieces.append({"name": name, "points": [], "out_of_memory": True})
    if settings.train_tokens and judge is not None:
        for name in contestants:
            network, _, precision = name.partition("@")
            if network in networks and not networks[network].windows:
                say(f"train {name} on {settings.train_tokens:,} tokens")
                try:
                    rows[name] |= judge(work.at(precision or precisions[0]), networks[network])
                except torch.OutOfMemoryError:
                    rows[name]["training_out_of_memory"] = True
    return {
        "commit": measured_commit,
        "hardware": hardware_info(work.place) | {"copy_bandwidth_gb_per_second": bandwidth / 1e9},
        "config": config(work),
        "versions": package_versions(),
        "absent": absent,
        "wrong": wrong,
        "rows": [rows[name] for name in wanted if name in rows],
        "pieces": pieces,
    }


def prepare(
    wanted: list[str], known: dict[str, Make], absent: dict[str, str], say: Say
) -> tuple[dict[str, Contestant], dict[str, dict[str, Any]], list[str]]:
    """Make all rows; those that do not fit the memory are results already, and some compute something else."""
    contestants: dict[str, Contestant] = {}
    rows: dict[str, dict[str, Any]] = {}
    wrong = []
    for number, name in enumerate(wanted, 1):
        say(f"prepare {name} ({number} of {len(wanted)})")
        try:
            contestants[name] = known[name]()
        except ImportError as error:
            absent[name] = f"{error}; pip install 'dsmr[bench]'"
        except UnfitError as error:
            absent[name] = str(error)
        except ArithmeticError as error:
            absent[name] = str(error)
            wrong.append(name)
        except torch.OutOfMemoryError:
            rows[name] = {"name": name, "out_of_memory": True}
    return contestants, rows, wrong


def take_turns(contestants: dict[str, Contestant], rows: dict[str, dict[str, Any]], work: Workload, say: Say) -> None:
    """Measure every row once in each round; one that runs out of memory leaves."""
    settings, place = work.settings, work.place
    for turn in range(settings.warmup + settings.repeats):
        say(f"turn {turn + 1} of {settings.warmup + settings.repeats}")
        for name, contestant in list(contestants.items()):
            if place.type == "cuda":
                torch.cuda.reset_peak_memory_stats(place)
            before = torch.cuda.memory_allocated(place) if place.type == "cuda" else 0
            try:
                contestant.turn(1)
                with timed(place) as seconds:
                    contestant.turn(settings.steps)
            except torch.OutOfMemoryError:
                del contestants[name]
                rows[name] = {"name": name, "out_of_memory": True}
                continue
            if place.type == "cuda":
                own = contestant.facts.get("state_mib", 0) * MIB
                peak = torch.cuda.max_memory_allocated(place) - before + own
                contestant.facts["peak_memory_gib"] = peak / GIB
            if turn >= settings.warmup:
                contestant.seconds.append(seconds[0] / settings.steps)


def figures(contestant: Contestant, all_of_them: dict[str, Contestant]) -> dict[str, Any]:
    """A row of the result."""
    seconds = statistics.median(contestant.seconds)
    row: dict[str, Any] = {
        "name": contestant.name,
        "kind": contestant.kind,
        "tokens_per_second": contestant.tokens / seconds,
        **contestant.facts,
    }
    _, at, precision = contestant.name.partition("@")
    decodes = contestant.kind == "decoding"
    name = decoding_name("full", row["lanes"], at + precision) if decodes else "full" + at + precision
    full = all_of_them.get(name)
    if full is not None:
        row["relative_to_full"] = statistics.median(
            (theirs / full.tokens) / (own / contestant.tokens)
            for own, theirs in zip(contestant.seconds, full.seconds, strict=True)
        )
    if "saved_mib" in row:
        row["saved_and_state_mib"] = row["saved_mib"] + row["state_mib"]
    if "floor_tokens_per_second" in row:
        row["share_of_floor"] = row["tokens_per_second"] / row["floor_tokens_per_second"]
    return row


def config(work: Workload) -> dict[str, Any]:
    """What rows have in common: sizes, tokens per step, seed; and the settings."""
    given = work.like.config() | vars(work.like.settings)
    sizes = {key: value for key, value in given.items() if key not in ("horizons", "rule", "dropout")}
    return {
        **sizes,
        "num_lanes": work.num_lanes,
        "tokens_per_step": work.num_lanes * work.segment_length,
        "precision": work.precision,
        "device": work.place.type,
        "dropout": 0.0,
        "seed": work.seed,
        "settings": asdict(work.settings),
    }
