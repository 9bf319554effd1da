"""Run the benchmark: prepare every row, then measure all rows in rounds."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from dsmr import UserError
from dsmr.benchmark.decoding_speed import decoding_row, x_transformers_decoding_row
from dsmr.benchmark.machine import copy_bandwidth, current_commit, hardware_info, package_versions
from dsmr.benchmark.peers import UnfitError
from dsmr.benchmark.settings import Workload
from dsmr.benchmark.training_speed import PEERS, MeasuredRow, network_training_row, peer_training_row
from dsmr.benchmark.variants import Row
from dsmr.cost import GIB, MIB
from dsmr.cost.measuring import peak_memory, reset_peak_memory, timed

Prepare = Callable[[], MeasuredRow]
Say = Callable[[str], None]
Train = Callable[[Workload, Row], dict[str, Any]]


def run_benchmark(work: Workload, say: Say = lambda line: None, train: Train | None = None) -> dict[str, Any]:
    """Measure all rows, reporting progress to `say`; an unknown row raises UserError.

    `train` trains and validates one of our rows; it is called if `train_tokens` is set.

    Returns:
        `{commit, hardware, config, versions, absent, wrong, rows, pieces}`. A row that ran out of memory says so; one
        whose backend differs from the reference is absent and listed as wrong.
    """
    commit, settings = current_commit(), work.settings
    bandwidth = copy_bandwidth(work.device)
    precisions: list[str] = [*settings.precisions] or [work.precision]
    known: dict[str, Prepare] = {}
    for precision in precisions:
        suffix = f"@{precision}" if len(precisions) > 1 else ""
        preparations, absent = list_rows(replace(work, precision=precision), bandwidth, suffix)
        known |= preparations
    for name in settings.rows:
        if name not in known and name not in absent:
            raise UserError(f"benchmark.rows: {name} is unknown; known: {', '.join(known)}")
    wanted = [name for name in settings.rows or known if name in known]
    measured, results, wrong = prepare_rows(wanted, known, absent, say)
    measure_rounds(measured, results, work, say)
    for name, row in measured.items():
        results[name] = row_result(row, measured)
    pieces = measure_pieces(work, say)
    if settings.train_tokens and train is not None:
        train_rows(measured, results, work, precisions[0], say, train)
    return {
        "commit": commit,
        "hardware": hardware_info(work.device) | {"copy_bandwidth_gb_per_second": bandwidth / 1e9},
        "config": common_config(work),
        "versions": package_versions(),
        "absent": absent,
        "wrong": wrong,
        "rows": [results[name] for name in wanted if name in results],
        "pieces": pieces,
    }


def list_rows(work: Workload, bandwidth: float, suffix: str = "") -> tuple[dict[str, Prepare], dict[str, str]]:
    """Return how to prepare every row, by name, and the reasons for those that are omitted."""
    networks, absent = work.known_rows()
    settings = work.settings
    rows: dict[str, Prepare] = {
        name + suffix: partial(network_training_row, name + suffix, work, row, work.backend)
        for name, row in networks.items()
    }
    for name in settings.materialised:
        if name in networks:
            full_name = f"materialised_{name}{suffix}"
            rows[full_name] = partial(network_training_row, full_name, work, networks[name], "materialised")
        elif settings.horizons is not None:
            raise UserError(f"benchmark.materialised: {name} is not in horizons; known: {', '.join(networks)}")
    if settings.peers:
        for name in PEERS:
            rows[name + suffix] = partial(peer_training_row, name, name + suffix, work)
    if settings.decode_tokens:
        for lanes in settings.decode_lanes:
            for name, row in networks.items():
                full_name = decoding_name(name, lanes, suffix)
                if not row.windows:
                    rows[full_name] = partial(decoding_row, full_name, work, row, lanes, bandwidth)
        if settings.peers:
            name = f"x_transformers_decode{suffix}"
            rows[name] = partial(x_transformers_decoding_row, name, work)
    return rows, absent


def decoding_name(name: str, lanes: int, suffix: str) -> str:
    """Return the name of a decoding row."""
    return f"{name}_decode" + (f"_{lanes}" if lanes > 1 else "") + suffix


def prepare_rows(
    wanted: list[str], known: dict[str, Prepare], absent: dict[str, str], say: Say
) -> tuple[dict[str, MeasuredRow], dict[str, dict[str, Any]], list[str]]:
    """Return rows to measure, results of those out of memory, and names of those that differ from the reference."""
    rows: dict[str, MeasuredRow] = {}
    results: dict[str, dict[str, Any]] = {}
    wrong = []
    for number, name in enumerate(wanted, 1):
        say(f"prepare {name} ({number} of {len(wanted)})")
        try:
            rows[name] = known[name]()
        except ImportError as error:
            absent[name] = f"{error}; pip install 'dsmr[bench]'"
        except (UnfitError, ArithmeticError) as error:
            absent[name] = str(error)
            if isinstance(error, ArithmeticError):
                wrong.append(name)
        except torch.OutOfMemoryError:
            results[name] = {"name": name, "out_of_memory": True}
    return rows, results, wrong


def measure_rounds(rows: dict[str, MeasuredRow], results: dict[str, dict[str, Any]], work: Workload, say: Say) -> None:
    """Measure every row once per round; a row that runs out of memory moves from `rows` to `results`."""
    settings, device = work.settings, work.device
    num_rounds = settings.warmup + settings.repeats
    for number in range(num_rounds):
        say(f"round {number + 1} of {num_rounds}")
        for name, row in list(rows.items()):
            reset_peak_memory(device)
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            try:
                row.run_steps(1)  # untimed: another row has just used the caches
                with timed(device) as seconds:
                    row.run_steps(settings.steps)
            except torch.OutOfMemoryError:
                del rows[name]
                results[name] = {"name": name, "out_of_memory": True}
                continue
            if device.type == "cuda":
                # all rows are allocated at once: the row's own peak is what it adds, and its state from before
                own_state = row.facts.get("state_mib", 0) * MIB
                peak = torch.cuda.max_memory_allocated(device) - before + own_state
                row.facts["peak_memory_gib"] = peak / GIB
            if number >= settings.warmup:
                row.seconds.append(seconds[0] / settings.steps)


def row_result(row: MeasuredRow, rows: dict[str, MeasuredRow]) -> dict[str, Any]:
    """Summarize a measured row, relative to the `full` row of its kind and precision."""
    speed = row.tokens / statistics.median(row.seconds)
    result: dict[str, Any] = {"name": row.name, "kind": row.kind, "tokens_per_second": speed, **row.facts}
    suffix = "".join(row.name.partition("@")[1:])
    full = rows.get(decoding_name("full", result["lanes"], suffix) if row.kind == "decoding" else "full" + suffix)
    if full is not None:
        result["relative_to_full"] = statistics.median(
            (theirs / full.tokens) / (own / row.tokens) for own, theirs in zip(row.seconds, full.seconds, strict=True)
        )
    if "saved_mib" in result:
        result["saved_and_state_mib"] = result["saved_mib"] + result["state_mib"]
    if "floor_tokens_per_second" in result:
        result["share_of_floor"] = result["tokens_per_second"] / result["floor_tokens_per_second"]
    return result


def measure_pieces(work: Workload, say: Say) -> list[dict[str, Any]]:
    """Measure time and memory of `full` and `two_scale` vs. piece length: linear time, constant memory."""
    networks, settings = work.known_rows()[0], work.settings
    pieces: list[dict[str, Any]] = []
    for name in ("full", "two_scale"):
        if settings.piece_lengths and name in networks and (not settings.rows or name in settings.rows):
            try:
                pieces.append({"name": name, "points": _piece_points(name, work, networks[name], say)})
            except torch.OutOfMemoryError:
                pieces.append({"name": name, "points": [], "out_of_memory": True})
    return pieces


@torch.inference_mode()
def _piece_points(name: str, work: Workload, row: Row, say: Say) -> list[dict[str, float]]:
    """Read one piece from its start, recording time and memory at the configured lengths in tokens.

    Each point has tokens, seconds so far, MiB of state, and the peak in GiB as of `peak_memory` (on a CPU that of the
    whole process, other rows included).
    """
    network = work.network(row, work.backend).eval()
    tokens, points, num_read, total = work.tokens(), [], 0, 0.0
    with work.autocast():
        memory = network.init_memory(1)
        network(tokens.draw(1, network.segment_length), memory)  # warm-up
        reset_peak_memory(work.device)
        for length in sorted(work.settings.piece_lengths):
            say(f"{name}: a piece of {length:,} tokens")
            with timed(work.device) as seconds:
                while num_read < length:
                    _, update = network(tokens.draw(1, network.segment_length), memory)
                    memory.commit(update)
                    num_read += network.segment_length
            total += seconds[0]
            point = {"tokens": num_read, "seconds": total, "state_mib": memory.num_bytes / MIB}
            points.append(point | peak_memory(work.device))
    return points


def train_rows(
    rows: dict[str, MeasuredRow],
    results: dict[str, dict[str, Any]],
    work: Workload,
    precision: str,
    say: Say,
    train: Train,
) -> None:
    """Train and validate our rows, adding the metrics to their results; `precision` is for names without one."""
    networks = work.known_rows()[0]
    for name in rows:
        network, _, own_precision = name.partition("@")
        if network in networks and not networks[network].windows:
            say(f"train {name} on {work.settings.train_tokens:,} tokens")
            try:
                results[name] |= train(replace(work, precision=own_precision or precision), networks[network])
            except torch.OutOfMemoryError:
                results[name]["training_out_of_memory"] = True


def common_config(work: Workload) -> dict[str, Any]:
    """Return what all rows share: sizes, options, tokens per step, seed and settings."""
    given = work.like.config() | vars(work.like.settings)
    return {
        **{key: value for key, value in given.items() if key not in ("horizons", "rule", "dropout")},
        "num_lanes": work.num_lanes,
        "tokens_per_step": work.num_lanes * work.segment_length,
        "precision": work.precision,
        "device": work.device.type,
        "dropout": 0.0,
        "seed": work.seed,
        "settings": asdict(work.settings),
    }
