"""Speed and memory of schedules, baselines and peers, side by side in one process.

Shapes: B lanes, T segment, M memory, V vocabulary. Every row trains or decodes the same tokens in the middle of a
piece: its memory is full. Rows take turns, so that a machine that slows down slows all of them; ratios are medians
over the turns of what two rows did in the same turn.
"""

import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsmr.model import Backbone, PerceiverAR, RecurrentTransformer, format_horizons, parse_horizons
from dsmr.model.attention import Form, chosen
from dsmr.model.decoder import Decoder
from dsmr.model.memory import MIB, Memory
from dsmr.module import token_nll
from dsmr.peers import PerceiverARPytorch, XTransformersXL

GIB = 2**30
Precision = Literal["32-true", "bf16-mixed", "fp16-mixed"]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
"""Largest difference of logits and gradients from the reference form, relative to the largest value."""


@dataclass
class Settings:
    """What is compared, and how; the defaults are base.yaml's sizes.

    Args:
        horizons: a row of ours for each name, with its horizons; `full` is what the others are compared with.
        materialised: names of horizons that are measured again with a score matrix that is kept.
        perceiver: also our Perceiver-AR-like baseline.
        peers: also x-transformers and perceiver-ar-pytorch, where they are installed.
        rows: only these rows; empty means all.
        d_model: E, of all networks; likewise the other sizes.
        num_layers: L.
        num_heads: of attention.
        segment_length: T.
        num_lanes: B.
        vocab_size: V.
        prefix_length: of the Perceivers, and M of x-transformers' memory.
        attention: form of all our rows but the materialised ones.
        compile_blocks: compile our layers.
        activation_checkpointing: in our networks.
        precision: of training.
        device: auto, cpu or cuda.
        repeats: turns that count.
        warmup: turns that do not.
        steps: training steps of a turn; one more goes before them untimed, since another row has just used the caches.
        decode_tokens: tokens that are decoded in a step; 0 leaves decoding out.
        decode_lanes: continuations at a time, one row for each number.
        seed: of weights and tokens.
    """

    horizons: dict[str, str] = field(
        default_factory=lambda: {
            "full": "12x4096",
            "two_scale": "2x3584+10x512",
            "binary": "3x4096+9x0",
            "uniform": "12x1024",
            "memoryless": "12x0",
        }
    )
    materialised: list[str] = field(default_factory=lambda: ["full", "two_scale"])
    perceiver: bool = True
    peers: bool = True
    rows: list[str] = field(default_factory=list)
    d_model: int = 512
    num_layers: int = 12
    num_heads: int = 8
    segment_length: int = 512
    num_lanes: int = 8
    vocab_size: int = 392
    prefix_length: int = 4096
    attention: Form = "auto"
    compile_blocks: bool = False
    activation_checkpointing: bool = False
    precision: Precision = "32-true"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    repeats: int = 7
    warmup: int = 1
    steps: int = 2
    decode_tokens: int = 32
    decode_lanes: list[int] = field(default_factory=lambda: [1])
    seed: int = 0

    def __post_init__(self) -> None:
        positive = (
            "repeats",
            "steps",
            "d_model",
            "num_layers",
            "num_heads",
            "segment_length",
            "num_lanes",
            "vocab_size",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if "full" not in self.horizons:
            raise ValueError("horizons must have the row `full`: what the others are compared with")
        for name in set(self.materialised) - set(self.horizons):
            raise ValueError(f"materialised: {name} is not in horizons; known: {', '.join(self.horizons)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch sees no CUDA device; use --device cpu")
        if self.precision != "32-true" and self.place.type == "cpu" and self.precision == "fp16-mixed":
            raise ValueError("precision fp16-mixed needs a CUDA device; use bf16-mixed or 32-true")

    @property
    def place(self) -> torch.device:
        """The device that is meant."""
        wanted = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        return torch.device(wanted)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of keys, values and matrix products."""
        return {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}[self.precision]

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of every forward pass."""
        if self.precision == "32-true":
            return nullcontext()
        return torch.autocast(self.place.type, dtype=self.compute_dtype)


class Contestant:
    """A row: something that trains or decodes a fixed number of tokens in a step.

    Attributes:
        name: of the row.
        kind: `training` or `decoding`.
        tokens: that a step reads.
        turn: does so many steps.
        facts: figures that do not depend on time.
    """

    def __init__(self, name: str, kind: str, tokens: int, turn: Callable[[int], None], facts: dict[str, Any]) -> None:
        self.name, self.kind, self.tokens, self.turn, self.facts = name, kind, tokens, turn, facts
        self.seconds: list[float] = []


Loss = Callable[[], Tensor]
AfterBackward = Callable[[], None]


@dataclass
class Step:
    """One training step, in parts.

    Attributes:
        network: whose parameters it trains.
        loss: forward pass and loss.
        after: what follows backward, such as writing the memory.
        state: tensors that stay from step to step.
        outside: storages that autograd may refer to, but that are state.
    """

    network: nn.Module
    loss: Loss
    after: AfterBackward
    state: Callable[[], list[Tensor]]


class Tokens:
    """The same random tokens for all rows."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.draws = torch.Generator().manual_seed(settings.seed)

    def draw(self, num_lanes: int, length: int) -> Tensor:
        """Token ids, (B, length), on the device."""
        drawn = torch.randint(4, self.settings.vocab_size, (num_lanes, length), generator=self.draws)
        return drawn.to(self.settings.place)


def network_of(settings: Settings, horizons: str | None, form: Form) -> Decoder:
    """One of our networks, with the same weights in every form."""
    torch.manual_seed(settings.seed)
    sizes: dict[str, Any] = {
        "d_model": settings.d_model,
        "num_layers": settings.num_layers,
        "num_heads": settings.num_heads,
        "dropout": 0.0,
        "attention": form,
        "compile_blocks": settings.compile_blocks,
        "activation_checkpointing": settings.activation_checkpointing,
    }
    if horizons is None:
        prefix = settings.prefix_length
        made: Decoder = PerceiverAR(settings.vocab_size, None, settings.segment_length, prefix_length=prefix, **sizes)
    else:
        made = RecurrentTransformer(settings.vocab_size, horizons, settings.segment_length, **sizes)
    return made.to(settings.place)


@torch.no_grad()
def filled(backbone: Backbone, settings: Settings, num_lanes: int, *, decoding: bool = False) -> Memory:
    """A memory in the middle of a piece: every layer has read as much as it keeps."""
    tokens = Tokens(settings)
    length = settings.segment_length
    with settings.autocast():
        memory = backbone.init_memory(num_lanes, decoding=decoding)
        longest = max((*backbone.horizons, getattr(backbone, "prefix_length", 0)))
        for _ in range(math.ceil(longest / length)):
            _, update = backbone(tokens.draw(num_lanes, length), memory)
            memory.commit(update)
    return memory


def our_step(settings: Settings, horizons: str | None, form: Form) -> Step:
    """A training step of one of our networks."""
    network = network_of(settings, horizons, form)
    memory = filled(network, settings, settings.num_lanes)
    tokens, pending = Tokens(settings), []

    def loss() -> Tensor:
        drawn = tokens.draw(settings.num_lanes, settings.segment_length + 1)
        with settings.autocast():
            logits_BTV, update = network(drawn[:, :-1], memory)
        pending.append(update)
        return token_nll(logits_BTV, drawn[:, 1:]).mean()

    def state() -> list[Tensor]:
        kept = memory.state_dict().values()
        return [t for part in kept for t in (part if isinstance(part, list) else [part]) if isinstance(t, Tensor)]

    return Step(network, loss, lambda: memory.commit(pending.pop()), state)


def peer_sizes(settings: Settings) -> dict[str, int]:
    """Our sizes, with the width of our gated MLP."""
    hidden = network_of(settings, "1x0" if settings.num_layers == 1 else f"{settings.num_layers}x0", "auto").config()
    return {
        "d_model": settings.d_model,
        "num_layers": settings.num_layers,
        "num_heads": settings.num_heads,
        "hidden_width": hidden["hidden_width"],
    }


def x_transformers_network(settings: Settings) -> XTransformersXL:
    """x-transformers' network, at our sizes."""
    torch.manual_seed(settings.seed)
    sizes = peer_sizes(settings)
    made = XTransformersXL(settings.vocab_size, settings.segment_length, settings.prefix_length, **sizes)
    return made.to(settings.place)


def x_transformers_step(settings: Settings) -> Step:
    """A training step of x-transformers with a memory of the full horizon."""
    network = x_transformers_network(settings)
    held = [network.init_memory(settings.num_lanes)]
    tokens = Tokens(settings)

    def loss() -> Tensor:
        drawn = tokens.draw(settings.num_lanes, settings.segment_length + 1)
        with settings.autocast():
            logits_BTV, memory = network(drawn[:, :-1], held[-1])
        held.append(memory)
        return token_nll(logits_BTV, drawn[:, 1:]).mean()

    return Step(network, loss, lambda: held.__delitem__(0), lambda: held[0])


def perceiver_ar_pytorch_step(settings: Settings) -> Step:
    """A training step of perceiver-ar-pytorch on prefix and segment."""
    torch.manual_seed(settings.seed)
    sizes, prefix = peer_sizes(settings), settings.prefix_length
    network = PerceiverARPytorch(settings.vocab_size, settings.segment_length, prefix, **sizes).to(settings.place)
    tokens = Tokens(settings)
    kept_BP = tokens.draw(settings.num_lanes, prefix)

    def loss() -> Tensor:
        drawn = tokens.draw(settings.num_lanes, settings.segment_length + 1)
        with settings.autocast():
            logits_BTV = network(torch.cat([kept_BP, drawn[:, :-1]], dim=1))
        return token_nll(logits_BTV, drawn[:, 1:]).mean()

    return Step(network, loss, lambda: None, lambda: [kept_BP])


def training(name: str, settings: Settings, step: Step, extra: dict[str, Any]) -> Contestant:
    """A row of training steps: forward, backward, writing the memory, AdamW."""
    optimizer = torch.optim.AdamW(step.network.parameters(), lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(settings.place.type, enabled=settings.precision == "fp16-mixed")

    def turn(steps: int) -> None:
        for _ in range(steps):
            loss = step.loss()
            scaler.scale(loss).backward()
            step.after()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

    facts = {
        "parameters": sum(p.numel() for p in step.network.parameters()),
        "state_mib": sum(t.numel() * t.element_size() for t in step.state()) / MIB,
        "saved_mib": saved_bytes(step) / MIB,
        **extra,
    }
    return Contestant(name, "training", settings.num_lanes * settings.segment_length, turn, facts)


def saved_bytes(step: Step) -> int:
    """Bytes that autograd keeps for backward, but for parameters and state, every storage counted once."""
    outside = {t.untyped_storage().data_ptr() for t in (*step.network.parameters(), *step.state())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.loss()
    size = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    step.after()
    step.network.zero_grad(set_to_none=True)
    return size


def check_form(settings: Settings, horizons: str | None, form: Form) -> float:
    """Largest difference of logits and gradients from the reference form, relative to the largest value.

    Raises:
        ArithmeticError: it is above the bound of the precision.
    """
    found: list[list[Tensor]] = []
    for each in (form, "reference"):
        network = network_of(settings, horizons, each)
        memory = filled(network_of(settings, horizons, "reference"), settings, settings.num_lanes)
        tokens_BT = Tokens(settings).draw(settings.num_lanes, settings.segment_length)
        with settings.autocast():
            logits_BTV, _ = network(tokens_BT, memory)
        logits_BTV.float().square().mean().backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        found.append([logits_BTV.detach(), *gradients])
    worst = max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-12))
        for a, b in zip(*found, strict=True)
    )
    if not worst <= TOLERANCE[settings.compute_dtype]:
        raise ArithmeticError(f"{form} differs from the reference form by {worst:.2e} at {horizons}: do not use it")
    return worst


def our_decoding(name: str, settings: Settings, horizons: str | None, num_lanes: int, bandwidth: float) -> Contestant:
    """A row of decoding with full rings, token by token."""
    network = network_of(settings, horizons, settings.attention).eval()
    memory = filled(network, settings, num_lanes, decoding=True)
    token_B1 = Tokens(settings).draw(num_lanes, 1)

    @torch.inference_mode()
    def turn(steps: int) -> None:
        memory.open_length = 0
        for _ in range(settings.decode_tokens * steps):
            with settings.autocast():
                _, update = network(token_B1, memory)
            memory.commit(update)

    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    itemsize = memory.dtype.itemsize
    opened = (
        settings.steps * settings.decode_tokens / 2 * settings.num_layers * 2 * itemsize * num_lanes * network.kv_width
    )
    kept = network.state_bytes(num_lanes, itemsize) if horizons is not None else 0
    floor = bandwidth / (weights + kept + opened)
    facts = {
        "lanes": num_lanes,
        "state_mib": memory.num_bytes / MIB,
        "floor_tokens_per_second": num_lanes * floor,
    }
    return Contestant(name, "decoding", num_lanes * settings.decode_tokens, turn, facts)


def x_transformers_decoding(name: str, settings: Settings) -> Contestant:
    """A row of x-transformers' decoding with its cache, at a context of the full horizon."""
    network = x_transformers_network(settings).eval()
    with torch.inference_mode(), settings.autocast():
        cache = network.begin_decoding(Tokens(settings).draw(1, settings.prefix_length))
    token_B1 = Tokens(settings).draw(1, 1)
    tokens = max(settings.decode_tokens // 4, 1)

    @torch.inference_mode()
    def turn(steps: int) -> None:
        for _ in range(tokens * steps):
            with settings.autocast():
                network.decode(token_B1, cache)

    return Contestant(name, "decoding", tokens, turn, {"lanes": 1})


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that this machine reads and writes while it copies 256 MiB, best of ten."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(10):
        with timed(device) as seconds:
            target.copy_(source)
        best = min(best, seconds[0])
    return 2 * source.numel() * source.element_size() / best


@contextmanager
def timed(device: torch.device) -> Iterator[list[float]]:
    """Seconds of the block, all of its kernels included."""
    seconds: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    yield seconds
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds.append(time.perf_counter() - began)


def makers(settings: Settings, bandwidth: float) -> dict[str, Callable[[], Contestant]]:
    """Every row by name, to be made when its turn comes."""
    rows: dict[str, Callable[[], Contestant]] = {}

    def ours(name: str, horizons: str | None, form: Form) -> Callable[[], Contestant]:
        def make() -> Contestant:
            difference = check_form(settings, horizons, form)
            step = our_step(settings, horizons, form)
            return training(
                name,
                settings,
                step,
                {
                    "horizons": None if horizons is None else format_horizons(parse_horizons(horizons)),
                    "attention": chosen(form, settings.place.type).__name__,
                    "difference_from_reference": difference,
                },
            )

        return make

    def decoding(name: str, horizons: str | None, lanes: int) -> Callable[[], Contestant]:
        return lambda: our_decoding(name, settings, horizons, lanes, bandwidth)

    for name, horizons in settings.horizons.items():
        rows[name] = ours(name, horizons, settings.attention)
    if settings.perceiver:
        rows["perceiver_ar"] = ours("perceiver_ar", None, settings.attention)
    for name in settings.materialised:
        rows[f"materialised_{name}"] = ours(f"materialised_{name}", settings.horizons[name], "materialised")
    if settings.peers:
        rows["x_transformers_xl"] = lambda: training("x_transformers_xl", settings, x_transformers_step(settings), {})
        rows["perceiver_ar_pytorch"] = lambda: training(
            "perceiver_ar_pytorch", settings, perceiver_ar_pytorch_step(settings), {}
        )
    if settings.decode_tokens:
        decoded: dict[str, str | None] = dict(settings.horizons)
        if settings.perceiver:
            decoded["perceiver_ar"] = None
        for lanes in settings.decode_lanes:
            for decoded_name, decoded_horizons in decoded.items():
                row = f"{decoded_name}_decode" + (f"_{lanes}" if lanes > 1 else "")
                rows[row] = decoding(row, decoded_horizons, lanes)
        if settings.peers:
            rows["x_transformers_decode"] = lambda: x_transformers_decoding("x_transformers_decode", settings)
    return rows


def run(settings: Settings, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure all rows.

    Args:
        settings: see `Settings`.
        say: is told what is being done.

    Returns:
        `{commit, hardware, config, versions, absent, rows}`; a row that ran out of memory says so.

    Raises:
        ValueError: a row that is not known.
        ArithmeticError: a fast form does not equal the reference.
    """
    place, measured_commit = settings.place, commit()
    bandwidth = copy_bandwidth(place)
    known = makers(settings, bandwidth)
    for name in settings.rows:
        if name not in known:
            raise ValueError(f"rows: {name} is unknown; known: {', '.join(known)}")
    wanted = settings.rows or list(known)
    contestants: dict[str, Contestant] = {}
    absent: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in wanted:
        say(f"prepare {name}")
        try:
            contestants[name] = known[name]()
        except ImportError as error:
            absent[name] = f"{error}; pip install dsmr[bench]"
        except torch.OutOfMemoryError:
            rows[name] = {"name": name, "out_of_memory": True}
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
    for name, contestant in contestants.items():
        rows[name] = figures(contestant, contestants)
    return {
        "commit": measured_commit,
        "hardware": hardware(place) | {"copy_bandwidth_gb_per_second": bandwidth / 1e9},
        "config": asdict(settings),
        "versions": versions(),
        "absent": absent,
        "rows": [rows[name] for name in wanted if name in rows],
    }


def figures(contestant: Contestant, all_of_them: dict[str, Contestant]) -> dict[str, Any]:
    """A row of the result."""
    seconds = statistics.median(contestant.seconds)
    row: dict[str, Any] = {
        "name": contestant.name,
        "kind": contestant.kind,
        "tokens_per_second": contestant.tokens / seconds,
        **contestant.facts,
    }
    lanes = contestant.facts.get("lanes", 1)
    full = all_of_them.get(
        "full" if contestant.kind == "training" else "full_decode" + (f"_{lanes}" if lanes > 1 else "")
    )
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


def commit() -> str | None:
    """The checkout's commit, None outside of one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def hardware(place: torch.device) -> dict[str, Any]:
    """What the figures were made on."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": _processor(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if place.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(place)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on, where they are installed."""
    found = {}
    for package in ("dsmr", "torch", "x-transformers", "perceiver-ar-pytorch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
