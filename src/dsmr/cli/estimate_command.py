"""`dsmr estimate`: memory, speed and cost of a training run, by arithmetic."""

import shlex
from typing import Any, ClassVar

from dsmr import UserError
from dsmr.benchmark.variant_costs import estimate_variants, format_mflop, variant_costs_table
from dsmr.cli.common_options import Options, check_output, write_result
from dsmr.cli.config_files import left_out
from dsmr.cli.lightning_cli import SizesCLI
from dsmr.cli.parser import underscored
from dsmr.cost import GIB, MIB
from dsmr.cost import estimate as costs
from dsmr.cost.devices import Device, find_device
from dsmr.cost.estimate import MAESTRO_TRAINING_TOKENS, TrainingPlan
from dsmr.model.blocks import Decoder

PRECISIONS = {None: "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


class EstimateCLI(SizesCLI):
    """The settings of training, and a device."""

    options: ClassVar[Options] = {
        "--device": (str | None, None, "GPU to estimate, such as rtx-3060-12gb (default: none)."),
        "--fit_memory": (None, False, "Find the largest budget that fits the device."),
        "--price_per_hour": (float | None, None, "Price of the device, in any currency."),
        "--epoch_tokens": (int, MAESTRO_TRAINING_TOKENS, "Tokens in an epoch (default: MAESTRO's training split)."),
    }


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr estimate`."""
    cli = EstimateCLI(command, arguments)
    settings, network = cli.config, cli.model.backbone
    output = check_output(settings.output)
    device = None if settings.device is None else find_device(settings.device)
    if device is None and (settings.fit_memory or settings.price_per_hour is not None):
        raise UserError("--fit-memory and --price-per-hour need a --device, for example --device rtx-3060-12gb")
    if (settings.price_per_hour is not None and settings.price_per_hour < 0) or settings.epoch_tokens < 1:
        raise UserError("--price-per-hour must not be below 0, --epoch-tokens not below 1")
    num_lanes, precision = cli.datamodule.num_lanes, precision_of(settings.trainer.precision)
    if isinstance(network, Decoder):
        plan = TrainingPlan(network, num_lanes, precision, device)
        result: dict[str, Any] = costs.estimate_training(plan, settings.epoch_tokens, settings.price_per_hour)
        if settings.fit_memory:
            result["fit_memory"] = costs.fit_memory(plan, settings.epoch_tokens)
        result["rows"], result["absent"] = estimate_variants(plan, settings.epoch_tokens)
        next_command = suggest_next(plan, result, arguments)
    else:
        result = costs.estimate_unknown_network(network, num_lanes, precision, device) | {"rows": [], "absent": {}}
        next_command = "dsmr fit with the same options, which first measures the time of an epoch"
    print("\n".join([*estimate_lines(result, device), "", *variant_costs_table(result["rows"], result["absent"])]))
    print(f"next: {next_command}")
    write_result(result, as_json=cli.config.json, output=output)
    return 0


def precision_of(given: object) -> str:
    """Return the full name of a Lightning precision; raise UserError if the cost model does not know it."""
    name = PRECISIONS.get(None if given is None else str(given), str(given))
    if name not in costs.PEAKS:
        raise UserError(f"trainer.precision {given} is not one of {', '.join(costs.PEAKS)}")
    return name


def estimate_lines(result: dict[str, Any], device: Device | None) -> list[str]:
    """Format the estimate of the run itself."""
    lanes = f"{result['num_lanes']} lanes of {result['segment_length']} tokens in {result['precision']}"
    state = f"{lanes}: state {result['state_bytes'] / MIB:,.1f} MiB"
    if "flops_per_token" in result:
        lines = [
            f"{result['parameters']:,} parameters, {format_mflop(result['flops_per_token'])} MFLOP per token trained "
            f"({format_mflop(result['executed_flops_per_token'])} executed by the {result['attention']} backend)",
            f"{state}, saved for backward {result['saved_bytes'] / MIB:,.0f} MiB",
        ]
    else:
        lines = [f"{result['parameters']:,} parameters", state]
    if "note" in result:
        lines.append(result["note"])
    if device is not None:
        low, high = result["tokens_per_second"]
        short, long = result["epoch_hours"]
        whose = " of MAESTRO" if result["epoch_tokens"] == MAESTRO_TRAINING_TOKENS else ""
        lines += [
            "",
            f"{device.name}: {device.memory_gib:g} GiB, {device.gigabytes_per_second:,g} GB/s ({device.source})",
            *(f"  {name:<20}{size / GIB:8.2f} GiB" for name, size in result["peak_parts"].items()),
            f"  {'peak':<20}{result['peak_bytes'] / GIB:8.2f} GiB, {'fits' if result['fits'] else 'DOES NOT FIT'} "
            f"{costs.usable_bytes(device) / GIB:.1f} GiB (a tenth is left free)",
            f"  {low:,.0f} to {high:,.0f} tokens/s at {costs.UTILISATION[0]:.0%} to {costs.UTILISATION[1]:.0%} of the "
            f"peak; an epoch of {result['epoch_tokens']:,} tokens{whose} takes {short:.2f} to {long:.2f} h"
            + ("" if "epoch_cost" not in result else " and costs {:.2f} to {:.2f}".format(*result["epoch_cost"])),
            "  bytes are computed, not measured on this device: expect 15 % error; the share of the peak is assumed",
        ]
    if "fit_memory" in result:
        fit = result["fit_memory"]
        lines.append(
            f"  largest budget: {fit['budget']:,} tokens, {fit['spelling']}, with {fit['num_lanes']} lanes: "
            f"{fit['peak_bytes'] / GIB:.2f} GiB; or {fit['largest_num_lanes']} lanes at the given horizons"
        )
    return lines


def suggest_next(plan: TrainingPlan, result: dict[str, Any], arguments: list[str]) -> str:
    """Return the next useful command, with the options that were given."""
    if plan.device is None:
        return "dsmr estimate --device rtx-3060-12gb --trainer.precision bf16-mixed estimates a GPU"
    if "fit_memory" in result:
        fit = result["fit_memory"]
        fitted = ("--trainer.precision", "--data.num_lanes", "--model.horizons", "--output", "--json")
        given = left_out(underscored(arguments), (*EstimateCLI.options, *fitted))
        largest = ["--data.num_lanes", str(fit["num_lanes"]), "--model.horizons", fit["spelling"]]
        return shlex.join(["dsmr", "fit", *given, "--trainer.precision", plan.precision, *largest])
    if plan.precision == "32-true":
        return "the same with --trainer.precision bf16-mixed"
    return "the same with --fit-memory finds the largest budget"
