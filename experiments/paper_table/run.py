"""Measure when memory begins to pay: rows of the paper's table in miniature, validated several times during training.

    python experiments/paper_table/run.py [--root runs/paper_table_cpu]      # DSMR_MAESTRO set; re-run to resume

Every row trains on the same batches. Training stops at each of `STAGES`, is validated on every eighth piece, and
resumes as if it had not stopped (the learning rate decays over all steps). At the end, all pieces of the split are
scored, and every eighth again with all memory taken away. Differences to `memoryless` are paired over pieces, at
equal tokens and seeds. Writes results.json and two plots of all finished runs below the root.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dsmr.benchmark.machine import current_commit, hardware_info, package_versions
from dsmr.benchmark.variants import VariantSizes, variant_rows
from dsmr.model.horizons import format_horizons
from dsmr.results.bootstrap import compare_tables, ratio_interval
from dsmr.results.piece_table import PieceTable, average_tables
from dsmr.results.plotting import COLOURS, make_panels

HERE = Path(__file__).resolve().parent
STAGES = (500, 1000, 2000, 4000, 8000)
TOKENS_PER_STEP = 1024
ROUGH = 8
"""Every n-th piece is scored at a stage."""
SIZES = VariantSizes(num_layers=4, segment_length=256, budget=2048, block=128, short=128, num_long=2, num_kept=2)
ROWS = {
    name: [f"--model.horizons={format_horizons(variant_rows(SIZES)[0][name].horizons or ())}"]
    for name in ("two_scale", "full", "memoryless", "uniform", "two_scale_interleaved")
}
"""Options of each variant in miniature: a budget of 2,048 tokens, four times as much for `full`."""
BASELINE, WITHOUT = "memoryless", "without"
THIN = {"markersize": 3, "linewidth": 1.2}
BY_POSITION = f"nats_per_token_less_{BASELINE}_by_position"


def options(row: str, seed: int) -> list[str]:
    """Return the options of `dsmr fit`, except where to stop."""
    schedule = [f"--model.lr_scheduler.total_steps={STAGES[-1]}", f"--data.validation_stride={ROUGH}"]
    return ["--config", "laptop", f"--seed_everything={seed}", *ROWS[row], *schedule]


def train(row: str, seed: int, root: Path) -> None:
    """Train and validate a row, or resume it, and keep the table of pieces of every stage."""
    name = f"{row}_seed{seed}"
    run, kept = root / name, root / "pieces"
    last, latest = run / "last.ckpt", run / "pieces.csv"
    kept.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        pieces = kept / f"{name}_{stage}.csv"
        if pieces.is_file():
            continue
        begun = last.is_file()
        if not begun:
            (kept / f"{name}.commit").write_text(f"{current_commit()}\n", encoding="utf-8")
        latest.unlink(missing_ok=True)  # it has the best weights' results, which may be those of an earlier stage
        until = [f"--{key}={stage}" for key in ("trainer.max_steps", "trainer.val_check_interval")]
        which = ["--resume", str(run)] if begun else [*options(row, seed), f"--root={root}", f"--name={name}"]
        dsmr(["fit", *which, *until, "--trainer.enable_progress_bar=false"], root / f"{name}.log")
        if latest.is_file():
            pieces.write_bytes(latest.read_bytes())
        else:
            validate(last, pieces, ROUGH, root / f"{name}.log")
        print(f"{name}: {stage * TOKENS_PER_STEP / 1e6:.1f} M tokens", flush=True)
    whole = kept / f"{name}.csv"
    if not whole.is_file():
        validate(last, whole, 1, root / f"{name}.log")
    without = kept / f"{name}_{WITHOUT}.csv"
    if row != BASELINE and not without.is_file():
        validate(last, without, ROUGH, root / f"{name}.log", ROWS[BASELINE])
    print(f"{name}: done", flush=True)


def validate(checkpoint: Path, pieces: Path, stride: int, log: Path, changes: Sequence[str] = ()) -> None:
    """Score every `stride`-th piece."""
    options = [f"--data.validation_stride={stride}", f"--pieces={pieces}", "--trainer.enable_progress_bar=false"]
    dsmr(["validate", "--checkpoint", str(checkpoint), *options, *changes], log)


def dsmr(arguments: Sequence[str], log: Path) -> None:
    """Run the program on one thread.

    Raises:
        RuntimeError: it failed.
    """
    with log.open("ab") as output:
        command = [sys.executable, "-m", "dsmr", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"dsmr {' '.join(arguments)} has failed, see {log}")


def finished(row: str, root: Path) -> list[int]:
    """Return the seeds of a row whose runs are completely scored."""
    names = [path.stem.removeprefix(f"{row}_seed") for path in (root / "pieces").glob(f"{row}_seed*.csv")]
    return sorted(int(name) for name in names if name.isdecimal())


def results(root: Path) -> dict[str, Any]:
    """Return the metrics of all finished rows, by seed and for their mean, with intervals over pieces."""
    found: dict[str, Any] = {}
    for row in ROWS:
        seeds = finished(row, root)
        if not seeds:
            continue
        found[row] = {
            "seeds": seeds,
            "commits": [(root / "pieces" / f"{row}_seed{seed}.commit").read_text().strip() for seed in seeds],
            "command": " ".join(["dsmr fit", *options(row, 0), f"--trainer.max_steps={STAGES[-1]}"]),
            "stages": [{"tokens": stage * TOKENS_PER_STEP, **row_metrics(row, f"_{stage}", root)} for stage in STAGES],
            "whole": row_metrics(row, "", root),
            "position": positions(average_tables(read(row, seeds, "", root))),
        }
        if row != BASELINE:
            found[row] |= of_memory(row, root)
        if row != "full":
            found[row]["whole"]["less_full"] = difference(row, "full", "", root)
    return found


def of_memory(row: str, root: Path) -> dict[str, Any]:
    """Return the nats saved by memory: by position relative to the baseline, and for the row's own weights."""
    seeds = finished(row, root)
    own, other = (average_tables(read(row, seeds, suffix, root)) for suffix in (f"_{STAGES[-1]}", f"_{WITHOUT}"))
    found = {"nats_per_note_without_memory_less_with": interval(compare_tables("without", row, other, own).difference)}
    shared = [seed for seed in seeds if seed in finished(BASELINE, root)]
    if shared:
        own, other = average_tables(read(row, shared, "", root)), average_tables(read(BASELINE, shared, "", root))
        parts = zip(own.starts, (own.nll_PK - other.nll_PK).T, own.tokens_PK.T, strict=True)
        found[BY_POSITION] = {
            str(start): interval(ratio_interval(nll_P, tokens_P)) for start, nll_P, tokens_P in parts
        }
    return found


def read(row: str, seeds: Sequence[int], suffix: str, root: Path) -> list[PieceTable]:
    """Read the tables of pieces of each seed: of all pieces, or of a stage."""
    return [PieceTable.read(root / "pieces" / f"{row}_seed{seed}{suffix}.csv") for seed in seeds]


def row_metrics(row: str, suffix: str, root: Path) -> dict[str, Any]:
    """Return the metrics of the mean over seeds, and by seed."""
    tables = read(row, finished(row, root), suffix, root)
    mean = average_tables(tables)
    return {
        "pieces": len(mean.names),
        "perplexity": interval(ratio_interval(mean.nll_P, mean.tokens_P, is_exp=True)),
        "nats_per_note": interval(ratio_interval(mean.nll_P, mean.notes_P)),
        "nats_per_note_by_seed": [float(table.nll_P.sum() / table.notes_P.sum()) for table in tables],
        f"less_{BASELINE}": difference(row, BASELINE, suffix, root),
    }


def difference(row: str, other: str, suffix: str, root: Path) -> dict[str, Any] | None:
    """Return the paired difference in nats per note to another row: of the means over seeds, and by seed."""
    seeds = [seed for seed in finished(row, root) if seed in finished(other, root)]
    if not seeds:
        return None
    own, others = read(row, seeds, suffix, root), read(other, seeds, suffix, root)
    mean = compare_tables(row, other, average_tables(own), average_tables(others))
    by_seed = [compare_tables(row, other, a, b).difference.value for a, b in zip(own, others, strict=True)]
    return {**interval(mean.difference), "wins": mean.wins, "seeds": seeds, "by_seed": by_seed}


def positions(table: PieceTable) -> dict[str, Any]:
    """Return the perplexity by position in the piece."""
    parts = zip(table.starts, table.nll_PK.T, table.tokens_PK.T, strict=True)
    return {str(start): interval(ratio_interval(nll_P, tokens_P, is_exp=True)) for start, nll_P, tokens_P in parts}


def interval(found: Any) -> dict[str, Any]:
    return {"value": found.value, "low": found.low, "high": found.high, "pieces": found.num_pieces}


def plot_curve(found: dict[str, Any], path: Path) -> None:
    """Plot nats per note relative to the baseline against training tokens."""
    figure, (axes,) = make_panels(1, height=3.6, columns=1)
    axes.axhline(0, color="#222222", linewidth=0.8)
    rows = list(zip(found, COLOURS, strict=False))
    compared = [(row, colour) for row, colour in rows if row != BASELINE and found[row]["whole"][f"less_{BASELINE}"]]
    for number, (row, colour) in enumerate(compared):
        points = [
            (stage["tokens"] * 1.02 ** (number - 2), stage[f"less_{BASELINE}"]) for stage in found[row]["stages"]
        ]
        x, y = [tokens for tokens, _ in points], [d["value"] for _, d in points]
        axes.plot(x, y, "o-", color=colour, markersize=3, linewidth=1.2, label=row)
        draw_intervals(axes, x, [d for _, d in points], colour)
    axes.set_xscale("log", base=2)
    ticks = [stage * TOKENS_PER_STEP for stage in STAGES]
    axes.set_xticks(ticks, [f"{tick / 1e6:.1f} M" for tick in ticks])
    axes.set_xlabel("training tokens")
    axes.set_ylabel(f"nats per note relative to {BASELINE} (lower is better)")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def plot_positions(found: dict[str, Any], path: Path) -> None:
    """Plot the final perplexity by position in the piece, and the difference to the baseline."""
    figure, (left, right) = make_panels(2, height=3.6, columns=2, shared=False)
    right.axhline(0, color="#222222", linewidth=0.8)
    for number, (row, colour) in enumerate(zip(found, COLOURS, strict=False)):
        bars = found[row]["position"]
        left.plot(places(bars), [bar["value"] for bar in bars.values()], "o-", color=colour, label=row, **THIN)
        bars = found[row].get(BY_POSITION)
        if bars:
            x = [place * 1.03 ** (number - 2) for place in places(bars)]
            right.plot(x, [bar["value"] for bar in bars.values()], "o-", color=colour, **THIN)
            draw_intervals(right, x, list(bars.values()), colour)
    starts = next(iter(found.values()))["position"]
    for axes, label in ((left, "perplexity"), (right, f"nats per token relative to {BASELINE} (lower is better)")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(places(starts), [f"{int(start):,}" for start in starts], rotation=60, fontsize=7)
        axes.minorticks_off()
        axes.set_xlabel("tokens of the piece before")
        axes.set_ylabel(label)
    left.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def draw_intervals(axes: Any, places: Sequence[float], bars: Sequence[dict[str, Any]], colour: str) -> None:
    """Draw a line from the lower to the upper end of each interval that exists."""
    known = [(x, bar["low"], bar["high"]) for x, bar in zip(places, bars, strict=True) if bar["low"] is not None]
    if known:
        axes.vlines(*zip(*known, strict=True), color=colour, linewidth=1)


def places(bars: dict[str, Any]) -> list[int]:
    """Return the positions of each range on a logarithmic axis; the first one starts at 0."""
    starts = [int(start) for start in bars]
    return [max(start, starts[1] // 2) for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/paper_table_cpu"))
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, each on one thread")
    arguments = parser.parse_args()
    seeds, root = arguments.seeds, arguments.root
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for done in [pool.submit(train, row, seed, root) for seed in seeds for row in arguments.rows]:
            done.result()
    found = results(root)
    machine = {"hardware": hardware_info(torch.device("cpu")) | {"threads": 1}, "versions": package_versions()}
    content = {"script": "experiments/paper_table/run.py", **machine, "rows": found}
    (arguments.output / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    plot_curve(found, arguments.output / "cpu-tokens.png")
    plot_positions(found, arguments.output / "cpu-positions.png")


if __name__ == "__main__":
    main()
