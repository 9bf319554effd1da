"""Estimate the memory and time of training from a network's sizes; nothing is trained, and no GPU is needed.

The bytes of the state are exact. What autograd saves was verified by measurement on a CPU (experiments/estimate); a
GPU's allocator, kernels and speed were not, so those estimates carry a range or a caveat.
"""

from dataclasses import dataclass, replace
from typing import Any

from dsmr import UserError
from dsmr.attention.backends import Backend
from dsmr.cost import GIB
from dsmr.cost.devices import Device, Peak
from dsmr.cost.operations import CostSizes, count_flops, saved_bytes
from dsmr.model import Backbone
from dsmr.model.backbone import build_on_meta, is_builtin, network_name
from dsmr.model.blocks import Decoder
from dsmr.model.horizons import format_horizons
from dsmr.model.schedules import Schedule

MAESTRO_TRAINING_TOKENS = 22_891_636
"""Targets in one epoch of MAESTRO v3.0.0's training split in the `performance` encoding (`dsmr prepare`)."""
UTILISATION = (0.20, 0.35)
"""Expected share of a GPU's peak that a network this small reaches in mixed precision; not measured yet."""
HEADROOM = 0.10
LONGEST_PIECE = 131_072  # tokens; no piece of MAESTRO is longer, so a longer horizon remembers nothing more

PEAKS: dict[str, Peak] = {
    "32-true": "float32",
    "bf16-mixed": "bfloat16",
    "bf16-true": "bfloat16",
    "16-mixed": "float16",
    "16-true": "float16",
}


@dataclass(frozen=True)
class TrainingPlan:
    """A network, which may be on torch's meta device, and how it is trained."""

    network: Decoder
    num_lanes: int
    precision: str  # as spelled by Lightning
    device: Device | None = None  # None for this machine's CPU, whose speed is unknown

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute precision."""
        return 4 if self.precision == "32-true" else 2

    @property
    def backend(self) -> Backend:
        """Attention backend that training will use."""
        if self.network.settings.attention != "auto":
            return self.network.settings.attention
        return "merged" if self.device is None else "flex"


def peak_parts(plan: TrainingPlan) -> dict[str, int]:
    """Split the peak memory of training into its parts, in bytes."""
    network, sizes = plan.network, CostSizes.of(plan.network)
    parameters = sum(p.numel() for p in network.parameters())
    itemsize = 2 if plan.precision.endswith("16-true") else 4
    tokens = plan.num_lanes * network.segment_length
    widest = plan.itemsize * (3 * sizes.hidden + 4 * sizes.width)
    saved = saved_bytes(network, plan.num_lanes, plan.backend, plan.itemsize, on_cpu=plan.device is None)
    return {
        "weights": itemsize * parameters,
        "gradients": itemsize * parameters,
        "optimizer": 2 * itemsize * parameters,  # the two moments of AdamW; Muon keeps only one for matrices
        "state": network.state_bytes(plan.num_lanes, plan.itemsize),
        "saved_for_backward": saved,
        # what backward needs in addition: gradients of the logits and of the widest layer
        "workspace": tokens * (2 * 4 * sizes.vocab + widest),
    }


def estimate_training(plan: TrainingPlan, epoch_tokens: int, price_per_hour: float | None = None) -> dict[str, Any]:
    """Estimate operations and memory of a plan, and with a device time and price (in any currency) per epoch.

    UserError if the device does not compute in this precision.
    """
    network, needed, parts = plan.network, count_flops(plan.network, plan.backend), peak_parts(plan)
    result = _common_part(network, plan.num_lanes, plan.precision) | {
        "attention": plan.backend,
        "flops_per_token": needed.model,
        "executed_flops_per_token": needed.executed,
        "state_bytes": parts["state"],
        "saved_bytes": parts["saved_for_backward"],
        "uncertainty": {"state_bytes": 0.0, "saved_bytes": 0.10 if plan.device is None else 0.15},
    }
    if plan.device is not None:
        flops_per_second = plan.device.peak(PEAKS[plan.precision])
        if flops_per_second is None:
            raise UserError(f"{plan.device.name} does not compute in {plan.precision}; use 16-mixed or 32-true")
        speeds = [share * flops_per_second / needed.executed for share in UTILISATION]
        slow, fast = (epoch_tokens / tokens_per_second / 3600 for tokens_per_second in speeds)
        peak = sum(parts.values())
        result |= {
            "device": plan.device.name,
            "peak_bytes": peak,
            "peak_parts": parts,
            "fits": peak <= usable_bytes(plan.device),
            "utilisation": list(UTILISATION),
            "tokens_per_second": speeds,
            "epoch_tokens": epoch_tokens,
            "epoch_hours": [fast, slow],
        }
        if price_per_hour is not None:
            result["epoch_cost"] = [fast * price_per_hour, slow * price_per_hour]
    name = network_name(type(network))
    if not is_builtin(name):
        result["note"] = f"operations and bytes cover dsmr's layers in {name}, not what it adds to them"
    return result


def estimate_unknown_network(
    network: Backbone, num_lanes: int, precision: str, device: Device | None
) -> dict[str, Any]:
    """Estimate the state of a network that is not built from dsmr's layers; a device raises UserError."""
    name = network_name(type(network))
    if device is not None:
        raise UserError(
            f"{name} is not made of dsmr's layers, so its cost on {device.name} is unknown; leave out --device"
        )
    return _common_part(network, num_lanes, precision) | {
        "state_bytes": network.state_bytes(num_lanes, 4 if precision == "32-true" else 2),
        "note": f"{name} is not made of dsmr's layers: its operations and saved activations are unknown",
    }


def _common_part(network: Backbone, num_lanes: int, precision: str) -> dict[str, Any]:
    """Return the sizes that every estimate repeats."""
    return {
        "horizons": list(network.horizons),
        "budget": sum(network.horizons),
        "parameters": sum(p.numel() for p in network.parameters()),
        "num_lanes": num_lanes,
        "segment_length": network.segment_length,
        "precision": precision,
    }


def usable_bytes(device: Device) -> int:
    """Return the device's memory minus the headroom for allocator overhead and other programs."""
    return int(device.memory_gib * GIB * (1 - HEADROOM))


def largest_horizons(plan: TrainingPlan, block: int) -> tuple[int, ...]:
    """Scale the plan's horizons to the largest budget that fits the device.

    Every layer keeps its share of the budget, in whole blocks, up to the longest piece. UserError if the network does
    not fit even without memory, or has no horizons to scale.
    """
    assert plan.device is not None
    shape = plan.network.horizons
    if not sum(shape):
        raise UserError("--fit-memory scales horizons; give some, for example --model.horizons 2x3584+10x512")
    parts = peak_parts(plan)
    rest = usable_bytes(plan.device) - sum(parts.values()) + parts["state"]
    per_token = parts["state"] / sum(shape)
    if plan.backend in ("reference", "materialised"):
        raise UserError(
            f"--fit-memory needs attention whose saved bytes are constant in the horizons, not {plan.backend}"
        )
    budget = int(rest / per_token) // block * block
    if budget < block:
        raise UserError(
            f"{plan.num_lanes} lanes of {plan.network.segment_length} tokens do not fit {plan.device.name} even "
            "without memory; use fewer data.num_lanes, a smaller network, or "
            "--model.backbone.activation_checkpointing true"
        )
    spent = min(budget, sum(shape) * LONGEST_PIECE // max(shape) // block * block)
    return tuple(min(tokens, LONGEST_PIECE) for tokens in _FixedShape(shape).spend(spent, len(shape), block))


@dataclass(frozen=True)
class _FixedShape(Schedule):
    """Given horizons as a schedule, so that they can be scaled to a budget."""

    tokens: tuple[int, ...]

    def horizons(self, num_layers: int) -> tuple[int, ...]:
        return self.tokens


def largest_lanes(plan: TrainingPlan) -> int:
    """Return the most lanes that fit the device at the plan's horizons; 0 if not even one fits."""
    assert plan.device is not None
    one, two = (sum(peak_parts(replace(plan, num_lanes=lanes)).values()) for lanes in (1, 2))
    rest = usable_bytes(plan.device) - one
    return 0 if rest < 0 else 1 + rest // max(two - one, 1)


def fit_memory(plan: TrainingPlan, epoch_tokens: int) -> dict[str, Any]:
    """Find the largest budget that fits, in the shape of the horizons, and the most lanes at the given horizons."""
    horizons = largest_horizons(plan, plan.network.memory_block)
    given: dict[str, Any] = plan.network.config() | {"horizons": horizons}
    network = build_on_meta(lambda: type(plan.network).rebuild(given, **vars(plan.network.settings)))
    larger = replace(plan, network=network)
    # horizons beyond the longest piece gain nothing, so memory that is left goes to lanes
    larger = replace(larger, num_lanes=max(plan.num_lanes, largest_lanes(larger)))
    largest = estimate_training(larger, epoch_tokens)
    return {
        "spelling": format_horizons(horizons),
        "largest_num_lanes": largest_lanes(plan),
        **{key: largest[key] for key in ("horizons", "budget", "num_lanes", "peak_bytes", "fits", "epoch_hours")},
        "usable_bytes": usable_bytes(plan.device) if plan.device else None,
    }
