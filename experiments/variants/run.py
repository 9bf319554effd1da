"""Compare all variants: what each keeps, what it recalls, and what it learns within minutes.

    python experiments/variants/run.py [--root runs/variants] [--jobs 2] [--only full two_scale]

Three measurements, each with a row per variant of `dsmr.benchmark.variants`:

state     at base.yaml's size: horizons, budget, parameters, bytes of the state by formula and as allocated
recall    trained on generated pieces: perplexity of the answers by distance (1 is perfect, 16 is chance)
maestro   trained on MAESTRO with equal tokens, scored on every 8th validation piece (needs DSMR_MAESTRO)

The last two train miniatures of 4 layers. For each, the script writes a sweep file below the root and runs `dsmr sweep
FILE --local`, so a broken run resumes with the same command. Prints the tables of README.md; writes results.json and
the plots.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsmr.attention.visibility import earliest_position
from dsmr.benchmark.machine import current_commit, package_versions
from dsmr.benchmark.variants import VARIANTS, WINDOW_SEGMENTS, Row, VariantSizes, variant_rows
from dsmr.cli import main as dsmr
from dsmr.cli.config_files import find_config
from dsmr.cli.lightning_cli import DsmrCLI
from dsmr.cost import MIB
from dsmr.data.synthetic import NUM_MARKS
from dsmr.model.horizons import format_horizons
from dsmr.model.memory import Memory
from dsmr.results.plotting import BAR, FAINT, LINE, make_panels
from dsmr.results.schedule_plots import ScheduleShape, plot_schedules

HERE = Path(__file__).resolve().parent
NUM_LAYERS = 4
ADAMW = ["--model.optimizer=dsmr.training.AdamW", "--model.optimizer.lr=2e-3"]
RECALL = "val/recall/perplexity_"


@dataclass(frozen=True)
class Miniature:
    """A small training run of every variant.

    Attributes:
        config: shipped config.
        options: of `dsmr fit`, for all variants.
        steps: optimizer steps.
        sizes: that horizons are derived from.
        num_lanes: B.
    """

    config: str
    options: list[str]
    steps: int
    sizes: VariantSizes
    num_lanes: int

    @property
    def rows(self) -> dict[str, Row]:
        """All variants at this size."""
        rows, absent = variant_rows(self.sizes)
        assert not absent, absent
        return rows

    def overlay(self, name: str) -> dict[str, Any]:
        """Return the variant's shipped overlay with the sizes of the miniature."""
        row, overlay = self.rows[name], yaml.safe_load(find_config(VARIANTS[name].overlay).read_text(encoding="utf-8"))
        backbone = overlay["model"].setdefault("backbone", {"class_path": "dsmr.model.RecurrentTransformer"})
        changes = backbone.setdefault("init_args", {})
        changes["num_layers"] = NUM_LAYERS
        if row.horizons is None:
            changes["prefix_length"] = self.sizes.full_horizon
        else:
            overlay["model"]["horizons"] = format_horizons(row.horizons)
        if row.windows:
            length = self.sizes.segment_length
            lanes = self.num_lanes // WINDOW_SEGMENTS
            overlay["data"] = {
                "segment_length": WINDOW_SEGMENTS * length,
                "num_lanes": lanes,
                "windows": {"stride": length},
            }
        return dict(overlay)

    def write_sweep(self, kind: str, names: list[str], root: Path) -> Path:
        """Write the sweep file and its overlays."""
        overlays = root / f"{kind}-overlays"
        overlays.mkdir(parents=True, exist_ok=True)
        for name in names:
            (overlays / f"{name}.yaml").write_text(yaml.safe_dump(self.overlay(name)), encoding="utf-8")
        every = [f"--{key}={self.steps}" for key in ("trainer.max_steps", "trainer.val_check_interval")]
        every.append(f"--save_every_n_steps={self.steps}")
        sweep = {
            "program": "dsmr",
            "name": kind,
            "method": "grid",
            "metric": {"name": "val/nats_per_note", "goal": "minimize"},
            "command": ["dsmr", "fit", "--config", self.config, *self.options, *every, "${args}"],
            "parameters": {
                "seed_everything": {"value": 0},
                "config": {"values": [str(overlays / f"{name}.yaml") for name in names]},
            },
        }
        path = root / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(sweep, sort_keys=False), encoding="utf-8")
        return path


MINIATURES = {
    "recall": Miniature(
        "recall", [], 800, VariantSizes(NUM_LAYERS, 64, 1024, 64, short=64, num_long=2, num_kept=2), 32
    ),
    "maestro": Miniature(
        "laptop", ADAMW, 600, VariantSizes(NUM_LAYERS, 256, 2048, 128, short=128, num_long=2, num_kept=2), 4
    ),
}


def measure_state(name: str) -> dict[str, Any]:
    """Measure a variant's state at base.yaml's size."""
    cli = DsmrCLI("fit", [f"--config={name}"])
    backbone, lanes = cli.model.backbone, cli.datamodule.num_lanes
    memory = backbone.init_memory(lanes)
    return {
        "horizons": list(backbone.horizons),
        "rule": backbone.rule,
        "segment_length": backbone.segment_length,
        "budget": sum(backbone.horizons),
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "lanes": lanes,
        "formula_bytes": backbone.state_bytes(lanes, memory.dtype.itemsize),
        "allocated_bytes": allocated_bytes(memory),
    }


def allocated_bytes(memory: Memory) -> int:
    """Return the bytes of the storages behind a memory, without the lanes' counters."""
    content = memory.state_dict()
    content.pop("length_B")
    values = [value for value in content.values() if not isinstance(value, int)]
    tensors = [tensor for value in values for tensor in (value if isinstance(value, list) else [value])]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def run_sweep(kind: str, names: list[str], root: Path, jobs: int) -> dict[str, dict[str, Any]]:
    """Train and validate the miniatures, and return the metrics of each."""
    path, output = MINIATURES[kind].write_sweep(kind, names, root), root / f"{kind}.json"
    options = ["--local", "--root", str(root), "--jobs", str(jobs), "--output", str(output)]
    if dsmr(["sweep", str(path), *options]):
        raise SystemExit(1)
    trials = json.loads(output.read_text(encoding="utf-8"))["trials"]
    results: dict[str, dict[str, Any]] = {}
    for trial in trials:
        metrics = {key: value for key, value in trial.items() if key.startswith("val/")}
        horizons = MINIATURES[kind].rows[trial["name"]].horizons
        results[trial["name"]] = {"horizons": list(horizons or ()), "metrics": metrics, "commit": current_commit()}
    if kind == "maestro" and "windowed" in results:
        results["windowed"]["random"] = score_random_windows(root / kind / "windowed")
    return results


def score_random_windows(run: Path) -> dict[str, Any]:
    """Score one random window of every piece of the validation split."""
    output = run / "random.json"
    options = ["--data.windows.protocol=random", "--data.validation_stride=1", "--output", str(output)]
    if dsmr(["validate", "--checkpoint", str(run), *options, "--trainer.enable_progress_bar=false"]):
        raise SystemExit(1)
    metrics: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))["metrics"]
    return metrics


def recall_by_distance(result: dict[str, Any]) -> dict[int, float]:
    """Return the perplexity of the answers by distance in tokens."""
    metrics = result["metrics"]
    return {int(key.removeprefix(RECALL)): metrics[key] for key in metrics if key.startswith(RECALL)}


def recall_reach(name: str) -> tuple[int, int]:
    """Return the tokens that a question of the recall task sees through one layer, and at most through all layers."""
    sizes, row = MINIATURES["recall"].sizes, MINIATURES["recall"].rows[name]
    length = sizes.segment_length
    if row.windows:
        return (WINDOW_SEGMENTS - 1) * length, WINDOW_SEGMENTS * length
    horizons = row.horizons or (sizes.full_horizon, *[0] * (NUM_LAYERS - 1))
    last = length * (sum(horizons) + 1) - 1  # the last position of a segment sees furthest
    return max(horizons), last - earliest_position(last, horizons, length, row.rule)


def plot_recall(
    perplexities: Mapping[str, Mapping[int, float]], reaches: Mapping[str, Sequence[int]], chance: int, path: Path
) -> None:
    """Plot the perplexity of recalled answers by distance, one panel per model.

    Args:
        perplexities: by model name and distance in tokens.
        reaches: by model name: tokens within reach of one layer, and at most of all layers.
        chance: perplexity of guessing.
        path: output file.
    """
    figure, panels = make_panels(len(perplexities), height=1.9)
    for axes, (name, by_distance) in zip(panels, perplexities.items(), strict=True):
        distances = sorted(by_distance)
        direct, deep = reaches[name]
        axes.axhline(chance, color=FAINT, linewidth=0.8, linestyle=":")
        axes.axvspan(0, min(direct, max(distances) + 40), color=BAR, alpha=0.2, linewidth=0)
        axes.axvline(deep, color=FAINT, linewidth=0.8, linestyle="--")
        axes.plot(distances, [by_distance[d] for d in distances], "o-", color=LINE, markersize=3, linewidth=1)
        axes.set_yscale("log")
        axes.set_ylim(0.9, 24)
        axes.set_yticks([1, 4, chance], ["1", "4", str(chance)])
        axes.minorticks_off()
        axes.set_xlim(0, max(distances) + 40)
        axes.set_title(name, fontsize=8)
    figure.supxlabel("Distance from the fact to its question (tokens)", fontsize=9)
    figure.supylabel("Answer perplexity (lower is better)", fontsize=9)
    figure.savefig(path, dpi=150)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)) + "\n"


def state_table(states: dict[str, dict[str, Any]]) -> str:
    """Format the measured states."""
    rows = []
    for name, state in states.items():
        spelling = format_horizons(state["horizons"]) or "prefix of 4096 ids"
        equal = state["formula_bytes"] == state["allocated_bytes"]
        rows.append(
            [
                f"`{name}`",
                f"`{spelling}`" + (" sliding" if state["rule"] == "sliding" else ""),
                f"{state['budget']:,}",
                f"{state['formula_bytes']:,}",
                "equal" if equal else f"{state['allocated_bytes']:,} allocated",
                f"{state['formula_bytes'] / MIB:,.1f}",
                f"{state['parameters']:,}",
            ]
        )
    header = ["variant", "horizons", "budget", "state bytes, formula", "allocated", "MiB", "parameters"]
    return markdown(header, rows)


def recall_table(results: dict[str, dict[str, Any]]) -> str:
    """Format the perplexities of the answers."""
    columns = {name: recall_by_distance(result) for name, result in results.items()}
    distances = sorted(next(iter(columns.values())))
    rows = []
    for name, by_distance in columns.items():
        direct, deep = recall_reach(name)
        spelling = format_horizons(results[name]["horizons"])
        cells = [f"{by_distance[distance]:.2f}" for distance in distances]
        rows.append([f"`{name}`", f"`{spelling}`" if spelling else "prefix 1024", str(direct), str(deep), *cells])
    return markdown(["variant", "horizons", "direct", "deep", *map(str, distances)], rows)


def maestro_table(results: dict[str, dict[str, Any]]) -> str:
    """Format the metrics on MAESTRO."""
    rows = []
    for name, result in results.items():
        metrics, spelling = result["metrics"], format_horizons(result["horizons"])
        cells = [f"{metrics['val/perplexity']:.2f}", f"{metrics['val/nats_per_note']:.2f}"]
        cells.append(f"{metrics['val/nats_per_second']:.1f}")
        rows.append([f"`{name}`", f"`{spelling}`" if spelling else "prefix 2048", *cells])
    return markdown(["variant", "horizons", "perplexity", "nats per note", "nats per second"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/variants"), help="folder of the sweeps")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of results.json and the plots")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at the same time")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="some of the variants")
    options = parser.parse_args()
    states = {name: measure_state(name) for name in options.only}
    print(state_table(states))
    kinds = ["recall", "maestro"] if os.environ.get("DSMR_MAESTRO") else ["recall"]
    if "maestro" not in kinds:
        print("DSMR_MAESTRO is not set: the measurement on MAESTRO is left out")
    results = {kind: run_sweep(kind, options.only, options.root, options.jobs) for kind in kinds}
    shapes = {
        name: ScheduleShape(tuple(state["horizons"]), state["segment_length"], state["rule"])
        for name, state in states.items()
        if any(state["horizons"])
    }
    options.output.mkdir(parents=True, exist_ok=True)
    plot_schedules(shapes, options.output / "schedules.png")
    perplexities = {name: recall_by_distance(result) for name, result in results["recall"].items()}
    reaches = {name: recall_reach(name) for name in perplexities}
    plot_recall(perplexities, reaches, NUM_MARKS, options.output / "recall.png")
    print(recall_table(results["recall"]))
    if "maestro" in results:
        print(maestro_table(results["maestro"]))
    document = {
        "commit": current_commit(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": package_versions(),
        "seed": 0,
        "state": states,
        **results,
    }
    (options.output / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
