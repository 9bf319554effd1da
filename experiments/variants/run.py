"""Every variant of the paper's table and ours, side by side: what it keeps, recalls, and learns in minutes.

    python experiments/variants.py [--root runs/variants] [--jobs 2] [--only full two_scale]

Three measurements, each a row per variant:

state     at base.yaml's size: horizons, budget, parameters, bytes of the state, by formula and as allocated
recall    trained on generated pieces: perplexity of the answers by distance (1 is perfect, 16 is chance)
maestro   trained on MAESTRO for equally many tokens, scored on every 8th validation piece (needs DSMR_MAESTRO)

The last two are a miniature of 4 layers in which a quarter of full's budget is spent in the same shapes. What is done
is not done again: a broken run of this script goes on. Tables and plots go to experiments/variants and
experiments/recall.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsmr.attention.visibility import earliest_position
from dsmr.cli.lightning_cli import DsmrCLI
from dsmr.cost import MIB
from dsmr.data.synthetic import NUM_MARKS
from dsmr.model.horizons import format_horizons, parse_horizons
from dsmr.model.memory import Memory
from dsmr.results.plotting import BAR, FAINT, LINE, make_panels
from dsmr.results.schedule_plots import ScheduleShape, plot_schedules

HERE = Path(__file__).resolve().parent.parent
WARNING = (
    "Minutes of a CPU do not show the paper's ordering: memory does not pay that early, and differences of a few per "
    "cent are within what another seed moves."
)


@dataclass(frozen=True)
class Variant:
    """A row.

    Attributes:
        horizons: of the miniature, in units; None for the Perceiver.
        paper: what the paper calls it.
        overrides: options in both measurements, `U` being the unit in tokens.
    """

    horizons: str | None
    paper: str = ""
    overrides: tuple[str, ...] = ()


VARIANTS = {
    "full": Variant("4x16", "full-memory Transformer-XL reference"),
    "perceiver_ar": Variant(
        None, "Perceiver-AR-like reference", ("--config=perceiver_ar", "--model.backbone.prefix_length=16U")
    ),
    "two_scale": Variant("2x7+2x1", "two-scale DSMR (final)"),
    "binary_sliding": Variant(
        "2x8+2x0", "selective retention DSMR (sliding-window)", ("--model.backbone.rule=sliding",)
    ),
    "ascending": Variant("1x1+1x3+1x5+1x7", "progressive ascending DSMR"),
    "binary": Variant("2x8+2x0", "selective retention, by layers"),
    "descending": Variant("1x7+1x5+1x3+1x1"),
    "uniform": Variant("4x4"),
    "two_scale_upper": Variant("2x1+2x7"),
    "two_scale_interleaved": Variant("1x7+1x1+1x7+1x1"),
    "two_scale_whole": Variant("2x31+2x1"),
    "memoryless": Variant("4x0"),
    "windowed": Variant(
        "4x0", "", ("--config=windowed", "--data.segment_length=4T", "--data.num_lanes=B", "--data.windows.stride=T")
    ),
}


@dataclass(frozen=True)
class Scale:
    """How a miniature is trained: options of `dsmr fit`, the unit and T in tokens, lanes of windows, tokens a step."""

    options: tuple[str, ...]
    unit: int
    segment_length: int
    window_lanes: int


ADAMW = ("--model.optimizer=dsmr.training.AdamW", "--model.optimizer.lr=2e-3")
STEPS = ("--trainer.max_steps={0}", "--trainer.val_check_interval={0}", "--save_every_n_steps={0}")
SCALES = {
    "recall": Scale(("--config=recall", "--model.backbone.num_layers=4", *(s.format(800) for s in STEPS)), 64, 64, 8),
    "maestro": Scale(("--config=laptop", *ADAMW, *(s.format(600) for s in STEPS)), 128, 256, 1),
}


def scaled(variant: Variant, scale: Scale) -> list[str]:
    """Options of `dsmr fit` for a variant's miniature."""
    sizes = {"16U": 16 * scale.unit, "4T": 4 * scale.segment_length, "T": scale.segment_length}
    sizes["B"] = scale.window_lanes
    options = []
    for override in variant.overrides:
        key, _, value = override.partition("=")
        options.append(f"{key}={sizes.get(value, value)}")
    if variant.horizons is not None:
        options.append(f"--model.horizons={format_horizons(miniature(variant, scale))}")
    return sorted([*scale.options, *options], key=lambda option: not option.startswith("--config="))


def miniature(variant: Variant, scale: Scale) -> tuple[int, ...]:
    assert variant.horizons is not None
    return tuple(units * scale.unit for units in parse_horizons(variant.horizons))


def state(name: str) -> dict[str, Any]:
    """A variant at base.yaml's size, as its overlay has it."""
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
        "allocated_bytes": allocated(memory),
    }


def allocated(memory: Memory) -> int:
    """Bytes of the storages behind all that a memory saves, but for the lanes' counters."""
    content = memory.state_dict()
    content.pop("length_B")
    tensors = [t for value in content.values() if not isinstance(value, int) for t in _listed(value)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def train(kind: str, name: str, root: Path, threads: int) -> dict[str, Any]:
    """Train and validate a variant's miniature in a process of its own; what was done before is read."""
    folder, result = root / kind / name, root / kind / f"{name}.json"
    fit = [*scaled(VARIANTS[name], SCALES[kind]), f"--root={folder.parent}", f"--name={name}"]
    if not result.exists():
        shutil.rmtree(folder, ignore_errors=True)
        dsmr(
            ["fit", *fit, "--trainer.enable_progress_bar=false", "--output", str(result.with_suffix(".part"))], threads
        )
        figures = json.loads(result.with_suffix(".part").read_text(encoding="utf-8"))
        if name == "windowed" and kind == "maestro":
            figures["random"] = random_windows(folder, threads)
        figures["command"] = shown(["dsmr", "fit", *scaled(VARIANTS[name], SCALES[kind])])
        figures["commit"] = commit()
        result.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        result.with_suffix(".part").unlink()
    print(f"{kind} {name}: done", flush=True)
    return {k: v for k, v in json.loads(result.read_text(encoding="utf-8")).items() if k != "run"}


def random_windows(folder: Path, threads: int) -> dict[str, Any]:
    """The same model in the protocol of one random window per piece, all pieces of the split."""
    output = folder / "random.json"
    options = ["--data.windows.protocol=random", "--data.validation_stride=1", "--output", str(output)]
    dsmr(["validate", "--checkpoint", str(folder), *options, "--trainer.enable_progress_bar=false"], threads)
    return json.loads(output.read_text(encoding="utf-8"))["metrics"]


def dsmr(arguments: list[str], threads: int) -> None:
    """Run the program with so many threads.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    program = Path(sys.executable).parent / "dsmr"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"dsmr {shown(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def shown(arguments: list[str]) -> str:
    return " ".join(argument.replace("--config=", "--config ") for argument in arguments)


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def recall_by_distance(figures: dict[str, Any]) -> dict[int, float]:
    prefix = "val/recall/perplexity_"
    metrics = figures["metrics"]
    return {int(key.removeprefix(prefix)): metrics[key] for key in metrics if key.startswith(prefix)}


def reach(name: str) -> tuple[int, int]:
    """Tokens that a question of the recall miniature surely sees through one layer, and at most through all."""
    scale = SCALES["recall"]
    if name == "windowed":
        return scale.segment_length * 3, scale.segment_length * 4
    variant = VARIANTS[name]
    horizons = (16 * scale.unit, 0, 0, 0) if variant.horizons is None else miniature(variant, scale)
    rule = "sliding" if "--model.backbone.rule=sliding" in variant.overrides else "boundary"
    last = scale.segment_length * (sum(horizons) + 1) - 1  # the last place of a segment: it sees furthest
    return max(horizons), last - earliest_position(last, horizons, scale.segment_length, rule)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


def state_table(states: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, row in states.items():
        spelling = format_horizons(row["horizons"]) or "prefix of 4096 ids"
        same = "equal" if row["formula_bytes"] == row["allocated_bytes"] else f"{row['allocated_bytes']:,} allocated"
        rows.append(
            [
                f"`{name}`",
                f"`{spelling}`" + (" sliding" if row["rule"] == "sliding" else ""),
                f"{row['budget']:,}",
                f"{row['formula_bytes']:,}",
                same,
                f"{row['formula_bytes'] / MIB:,.1f}",
                f"{row['parameters']:,}",
            ]
        )
    header = ["variant", "horizons", "budget", "state bytes, formula", "allocated", "MiB", "parameters"]
    return markdown(header, rows)


def recall_table(results: dict[str, dict[str, Any]]) -> str:
    columns = {name: recall_by_distance(figures) for name, figures in results.items()}
    distances = sorted(next(iter(columns.values())))
    rows = []
    for name, by_distance in columns.items():
        direct, deep = reach(name)
        horizons = results[name]["horizons"]
        spelling = f"`{format_horizons(horizons)}`" if horizons else "prefix 1024"
        cells = [f"{by_distance[d]:.2f}" for d in distances]
        rows.append([f"`{name}`", spelling, str(direct), str(deep), *cells])
    return markdown(["variant", "horizons", "direct", "deep", *map(str, distances)], rows)


def maestro_table(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, figures in results.items():
        metrics, horizons = figures["metrics"], figures["horizons"]
        rows.append(
            [
                f"`{name}`",
                f"`{format_horizons(horizons)}`" if horizons else "prefix 2048",
                f"{metrics['val/perplexity']:.2f}",
                f"{metrics['val/nats_per_note']:.2f}",
                f"{metrics['val/nats_per_second']:.1f}",
                f"`{figures['command']}`",
            ]
        )
    return markdown(["variant", "horizons", "perplexity", "nats per note", "nats per second", "command"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="All variants side by side.")
    parser.add_argument("--root", type=Path, default=Path("runs/variants"), help="folder of runs and results")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of tables and plots")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="some of the variants")
    options = parser.parse_args()
    kinds = ["recall", "maestro"] if os.environ.get("DSMR_MAESTRO") else ["recall"]
    if "maestro" not in kinds:
        print("DSMR_MAESTRO is not set: MAESTRO's column is left out")
    states = {name: state(name) for name in options.only}
    print(state_table(states))
    for kind in kinds:
        (options.root / kind).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {
            (kind, name): pool.submit(train, kind, name, options.root, 1) for kind in kinds for name in options.only
        }
        done = {key: future.result() for key, future in futures.items()}
    results = {kind: {name: done[kind, name] for name in options.only} for kind in kinds}
    write(options.results, states, results)
    return 0


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


def write(folder: Path, states: dict[str, dict[str, Any]], results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Two pages with tables and plots, and all figures as JSON."""
    for name in ("variants", "recall"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    recall, maestro = results["recall"], results.get("maestro")
    depths = {
        name: ScheduleShape(tuple(row["horizons"]), row["segment_length"], row["rule"])
        for name, row in states.items()
        if any(row["horizons"])
    }
    plot_schedules(depths, folder / "variants" / "schedules.png")
    perplexities = {name: recall_by_distance(figures) for name, figures in recall.items()}
    plot_recall(perplexities, {name: reach(name) for name in recall}, NUM_MARKS, folder / "recall" / "variants.png")
    commits = sorted({figures["commit"] for rows in results.values() for figures in rows.values()})
    place = {
        "commits": commits,
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, one thread for each training",
        "versions": {package: version(package) for package in ("torch", "lightning", "miditok")},
        "seed": 0,
    }
    told = f"{place['hardware']},\ntorch {version('torch')}, float32, seed 0, commit {', '.join(commits)}."
    (folder / "recall" / "variants.md").write_text(RECALL_PAGE.format(told, recall_table(recall)), encoding="utf-8")
    page = STATE_PAGE.format(state_table(states)) + (
        MAESTRO_PAGE.format(told, WARNING, maestro_table(maestro), random_row(maestro)) if maestro else ""
    )
    (folder / "variants" / "README.md").write_text(page, encoding="utf-8")
    everything = place | {"state": states, **results}
    (folder / "variants" / "results.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    print(page, recall_table(recall), sep="\n")


def random_row(results: dict[str, dict[str, Any]]) -> str:
    """What the windowed model has in the protocol of one random window per piece."""
    random = results.get("windowed", {}).get("random")
    if not random:
        return ""
    return (
        f"{random['val/nll']:.2f} nats (perplexity {random['val/perplexity']:.2f}, {random['val/tokens']:,.0f} tokens)"
    )


RECALL_PAGE = """# What every variant recalls

    python experiments/variants.py

Generated pieces ask for the loudness of their first notes: 1 is perfect recall, 16 is chance. `configs/recall.yaml`
with 4 layers (T 64, width 64, 32 lanes of 64 tokens, 800 steps, so 1.6 M tokens each); all but `full`,
`two_scale_whole`, `perceiver_ar`, `memoryless` and `windowed` keep 1,024 tokens in all, a quarter of `full`. {}

*direct* is the longest horizon: a question surely sees so far through one layer. *deep* is how far back anything at
all can reach it, through all layers from a segment's last place: beyond that, only chance is left. In between, an
answer must be handed on from layer to layer: what an earlier question found out is remembered in the layers above.

![Perplexity by distance; shaded: direct, dashed: deep, dotted: chance](variants.png)

{}"""

STATE_PAGE = """# Every variant of the paper's table and ours

    python experiments/variants.py          # all of it: with MAESTRO about an hour and a half on 2 CPU cores

## What they keep

At base.yaml's size: 12 layers, T 512, 8 lanes, float32. The bytes of the state are those of the formula, and those of
the storages that were allocated. Perceiver's state is token ids; it stands outside the equality of bytes.

{}
![The horizon of every layer, and how far it sees through those below](schedules.png)
"""

MAESTRO_PAGE = """
## What minutes of a CPU bring them

A miniature of `configs/laptop.yaml`'s size: 4 layers, width 128, T 256, a budget of 2,048 tokens, a quarter of
`full`'s; 600 steps of 1,024 tokens, so **0.6 M training tokens** each, a thirty-seventh of an epoch of MAESTRO v3.0.0
(about 4 % of the places in `windowed`'s batches are padding, under 1 % in the others');
scored on every 8th official validation piece (18 of 137, 320,782 tokens: partial). {}

**{}**

{}
`windowed` reads windows of 1,024 tokens and is scored with at least 768 of context. In the protocol of one random
window for each of the 137 validation pieces it has
{}.
gwinndr/MusicTransformer-Pytorch publishes 1.92 to 1.99 nats in that protocol for 6 layers of width 512, the best of
300 epochs (windows of 2,048 tokens, drawn anew each time, MAESTRO v2, another pre-processor for the same vocabulary):
nothing to be compared with before a GPU has trained ours.
"""


if __name__ == "__main__":
    sys.exit(main())
