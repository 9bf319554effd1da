"""Measure the speed of generation, the cost of the mask, the time to start, and that memory stays constant.

    python experiments/generation/run.py

A network of d_model 256 and 8 layers, horizons 2x4096+6x512, segments of 512 tokens, random weights, full rings:
speed does not depend on the weights. Variants take turns in one process. MAESTRO has 39.8 tokens per second of music.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from dsmr.attention import decode as compiled
from dsmr.benchmark.machine import current_commit, hardware_info, package_versions
from dsmr.cost import MIB
from dsmr.data.tokenizer import TokenizerSpec, build_tokenizer
from dsmr.data.vocabulary import BOS
from dsmr.generate import Generator, Prompt, Sampling
from dsmr.generate.grammar import Grammar
from dsmr.model import RecurrentTransformer
from dsmr.model.horizons import TOKENS_PER_SECOND
from dsmr.results.run_files import SECTION
from dsmr.share.description import describe_network

HORIZONS, SEGMENT = "2x4096+6x512", 512
TOKENS, TURNS = 200, 7


class Anything(Grammar):
    """A grammar that allows everything, to measure generation without a mask."""

    def begin(self, ids: Sequence[int], num_lanes: int, first_tick: int = 0) -> None:
        """Allow everything."""
        self.tick_B = torch.zeros(num_lanes, dtype=torch.long)
        self.everything = torch.ones(num_lanes, 392, dtype=torch.bool)

    def allowed(self, *, may_end: bool) -> Tensor:
        """Return a mask that allows everything."""
        return self.everything

    def advance(self, tokens_B: Tensor) -> None:
        """Keep nothing."""


def network() -> RecurrentTransformer:
    """Build the network with random weights."""
    torch.manual_seed(0)
    return RecurrentTransformer(392, HORIZONS, SEGMENT, d_model=256, num_layers=8, num_heads=4).eval()


def turns(made: Generator, prompt: Prompt) -> dict[str, Callable[[], float]]:
    """Return a function for each row that measures tokens per second of one turn, over all lanes."""

    def generation(lanes: int, grammar: Grammar | None = None) -> Callable[[], float]:
        steps = made.tokens(prompt, num=lanes, may_end=False, grammar=grammar)
        next(steps)

        def turn() -> float:
            began = time.perf_counter()
            for _ in islice(steps, TOKENS):
                pass
            return lanes * TOKENS / (time.perf_counter() - began)

        return turn

    def bare(lanes: int) -> Callable[[], float]:
        _, memory = made.prefill(prompt.ids, lanes)
        token_B1 = torch.full((lanes, 1), 5)

        @torch.inference_mode()
        def turn() -> float:
            began = time.perf_counter()
            for _ in range(TOKENS):
                _, update = made.backbone(token_B1, memory)
                memory.commit(update)
            return lanes * TOKENS / (time.perf_counter() - began)

        return turn

    def uncompiled(turn: Callable[[], float]) -> Callable[[], float]:
        def plain() -> float:
            kept, compiled.decode_kernel = compiled.decode_kernel, lambda: None  # type: ignore[assignment]
            try:
                return turn()
            finally:
                compiled.decode_kernel = kept

        return plain

    def reading() -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            made.prefill(prompt.ids)
        return len(prompt.ids) / (time.perf_counter() - began)

    found: dict[str, Callable[[], float]] = {}
    for lanes in (1, 4):
        found[f"generate, {lanes} at once"] = generation(lanes)
        found[f"generate, {lanes} at once, no mask"] = generation(lanes, Anything())
        found[f"network alone, {lanes} at once"] = bare(lanes)
        found[f"generate, {lanes} at once, without numba"] = uncompiled(generation(lanes))
    found["reading a prompt"] = reading
    return found


def start_up(folder: Path) -> dict[str, float]:
    """Measure the seconds of `dsmr generate` for a moment of music, the first time (numba compiles) and afterwards."""
    checkpoint, tokenizer = folder / "random.ckpt", {"name": "performance", "config": {}}
    weights = {f"backbone.{name}": weight for name, weight in network().state_dict().items()}
    section = describe_network(network(), tokenizer)
    torch.save({SECTION: section, "state_dict": weights}, checkpoint)
    # a moment of music: 64 tokens, a fifth of a second
    command = [sys.executable, "-m", "dsmr", "generate", "--checkpoint", str(checkpoint), "--seconds", "0.01"]
    found = {}
    for name, runs in (("start, the first time", 1), ("start, afterwards", 5)):
        walls = []
        for _ in range(runs):
            began = time.perf_counter()
            environment = os.environ | {"NUMBA_CACHE_DIR": str(folder / "numba")}
            output = ["--output", str(folder / "music.mid")]
            subprocess.run([*command, *output], env=environment, check=True, capture_output=True)
            walls.append(time.perf_counter() - began)
        found[name] = median(walls)
    return found


def resident_mib() -> float:
    """Return the resident size of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def long_run(made: Generator, prompt: Prompt, tokens: int) -> dict[str, list[float]]:
    """Measure resident size and speed while one lane generates `tokens` tokens."""
    steps = made.tokens(prompt, may_end=False)
    next(steps)
    found: dict[str, list[float]] = {"tokens": [], "resident_mib": [], "tokens_per_second": []}
    for done in range(0, tokens, 1000):
        began = time.perf_counter()
        for _ in islice(steps, 1000):
            pass
        found["tokens"].append(done + 1000)
        found["tokens_per_second"].append(1000 / (time.perf_counter() - began))
        found["resident_mib"].append(resident_mib())
    return found


def plot_long_run(run: dict[str, list[float]], state_mib: float, path: Path) -> None:
    """Plot resident size and speed against tokens."""
    from dsmr.results.plotting import BAR, FAINT, make_panels

    figure, panels = make_panels(2, height=2.6, columns=2, shared=False)
    for axes, name, label in zip(
        panels, ("resident_mib", "tokens_per_second"), ("Resident size (MiB)", "Tokens per second"), strict=True
    ):
        axes.plot(run["tokens"], run[name], color=BAR, linewidth=1)
        axes.set_ylim(0, 1.1 * max(run[name]))
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("Tokens generated", fontsize=8)
        axes.grid(linewidth=0.3, color=FAINT)
    panels[0].axhline(state_mib, color=FAINT, linestyle="--", linewidth=1)
    panels[0].annotate("memory and open segment", (0, state_mib), fontsize=7, va="bottom")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens of the long run")
    options = parser.parse_args()
    made = Generator(network(), build_tokenizer(TokenizerSpec()), Sampling(top_p=0.98))
    first = islice(made.tokens(may_end=False), 9 * SEGMENT)
    prompt = Prompt([BOS, *(token for (token,) in first)])
    rows = turns(made, prompt)
    found: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(TURNS + 1):
        for name, row in rows.items():
            speed = row()
            if turn:  # the first one warms up
                found[name].append(speed)
    state = made.backbone.init_memory(1, decoding=True).num_bytes / MIB
    with tempfile.TemporaryDirectory() as folder:
        starts = start_up(Path(folder))
    run = long_run(made, prompt, options.tokens)
    result = {
        "hardware": hardware_info(torch.device("cpu")),
        "versions": package_versions(),
        "commit": current_commit(),
        "command": f"python experiments/generation/run.py --tokens {options.tokens}",
        "horizons": HORIZONS,
        "tokens_per_second": {
            name: {"median": median(speeds), "least": min(speeds), "most": max(speeds)}
            for name, speeds in found.items()
        },
        "times_real_time": {
            name: median(speeds) / TOKENS_PER_SECOND for name, speeds in found.items() if name.startswith("generate")
        },
        "start_seconds": starts,
        "state_mib": state,
        "long_run": run,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot_long_run(run, state, options.output / "memory.png")
    for name, row in result["tokens_per_second"].items():
        print(f"{name:<46}{row['median']:8.0f} tokens/s ({row['least']:.0f} to {row['most']:.0f})")
    for name, seconds in starts.items():
        print(f"{name:<46}{seconds:8.1f} s")
    print(f"resident {run['resident_mib'][0]:.1f} MiB after 1,000 tokens, {run['resident_mib'][-1]:.1f} at the end")


if __name__ == "__main__":
    main()
