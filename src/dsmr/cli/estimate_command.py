"""`dsmr estimate`: what a training run needs and takes, before anyone trains."""

import shlex
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

from dsmr import UserError
from dsmr.benchmark.variants import WINDOW_SEGMENTS, Sizes, build, variant_rows
from dsmr.cli.configs import left_out
from dsmr.cli.json_output import check_output, write_result
from dsmr.cli.lightning import SizesCLI
from dsmr.cost import GIB, MIB
from dsmr.cost import estimate as costs
from dsmr.cost.devices import Device, find_device
from dsmr.cost.estimate import TrainingPlan
from dsmr.model.backbone import build_on_meta
from dsmr.model.blocks import Decoder
from dsmr.model.horizons import format_horizons

OWN_OPTIONS = ("--device", "--fit-memory", "--price-per-hour", "--epoch-tokens", "--output", "--json")
FITTED_OPTIONS = ("--trainer.precision", "--data.num_lanes", "--model.horizons")
PRECISIONS = {None: "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


class EstimateCLI(SizesCLI):
    """The same configuration as training, with a device."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:  # noqa: D102
        super().add_arguments_to_parser(parser)
        parser.add_argument("--device", type=str | None, default=None, help="A GPU's name, such as rtx-3060-12gb.")
        parser.add_argument("--fit-memory", action="store_true", help="Find the largest budget that fits the device.")
        parser.add_argument("--price-per-hour", type=float | None, default=None, help="Of the device, any currency.")
        parser.add_argument(
            "--epoch-tokens", type=int, default=costs.MAESTRO_TRAINING_TOKENS, help="Tokens of the training split."
        )


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
            result["fit_memory"] = fitted(plan, settings.epoch_tokens)
        result["rows"], result["absent"] = rows(plan, settings.epoch_tokens)
        following = hint(plan, result, arguments)
    else:
        result = costs.estimate_unknown_network(network, num_lanes, precision, device) | {"rows": [], "absent": {}}
        following = "dsmr fit with the same options begins with a measured time per epoch"
    print(text(result, device))
    print(f"next: {following}")
    write_result(result, as_json=cli.as_json, output=output)
    return 0


def precision_of(given: object) -> str:
    """Lightning's precision by its full name.

    Raises:
        UserError: one that the cost model does not know.
    """
    name = PRECISIONS.get(None if given is None else str(given), str(given))
    if name not in costs.PEAKS:
        raise UserError(f"trainer.precision {given} is not one of {', '.join(costs.PEAKS)}")
    return name


def fitted(plan: TrainingPlan, epoch_tokens: int) -> dict[str, Any]:
    """The largest budget in the config's shape, and the most lanes at the config's horizons."""
    horizons = costs.largest_horizons(plan, plan.network.memory_block)
    given: dict[str, Any] = plan.network.config() | {"horizons": horizons}
    network = build_on_meta(lambda: type(plan.network).rebuild(given, **vars(plan.network.settings)))
    larger = TrainingPlan(network, plan.num_lanes, plan.precision, plan.device)
    # where horizons hold the longest piece, what is left goes into lanes
    larger = replace(larger, num_lanes=max(plan.num_lanes, costs.largest_lanes(larger)))
    largest = costs.estimate_training(larger, epoch_tokens)
    return {
        "spelling": format_horizons(horizons),
        "largest_num_lanes": costs.largest_lanes(plan),
        **{key: largest[key] for key in ("horizons", "budget", "num_lanes", "peak_bytes", "fits", "epoch_hours")},
        "usable_bytes": costs.usable_bytes(plan.device) if plan.device else None,
    }


def rows(plan: TrainingPlan, epoch_tokens: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The paper's table at the config's sizes and budget, each beside full; and what cannot be expressed."""
    network = plan.network
    budget = sum(network.horizons)
    if not budget:
        return [], {"every other row": "the configuration keeps no memory whose budget the others could spend"}
    sizes = Sizes(len(network.blocks), network.segment_length, budget, network.memory_block)
    known, absent = variant_rows(sizes)
    found: list[dict[str, Any]] = []
    for name, row in known.items():
        lanes = max(plan.num_lanes // WINDOW_SEGMENTS, 1) if row.windows else plan.num_lanes
        with torch.device("meta"):
            made: Decoder = build(row, network, prefix_length=sizes.full_horizon)
        figures = costs.estimate_training(TrainingPlan(made, lanes, plan.precision, plan.device), epoch_tokens)
        spelling = format_horizons(row.horizons) if row.horizons else None
        found.append({"name": name, "spelling": spelling, **{k: v for k, v in figures.items() if k != "peak_parts"}})
    for row_figures in found:
        row_figures["flops_relative_to_full"] = (
            row_figures["executed_flops_per_token"] / found[0]["executed_flops_per_token"]
        )
    return found, absent


def text(result: dict[str, Any], device: Device | None) -> str:
    """What people read."""
    lanes = f"{result['num_lanes']} lanes of {result['segment_length']} tokens in {result['precision']}"
    state = f"{lanes}: state {result['state_bytes'] / MIB:,.1f} MiB"
    if "flops_per_token" in result:
        lines = [
            f"{result['parameters']:,} parameters, {result['flops_per_token'] / 1e6:,.0f} MFLOP per token of training "
            f"({result['executed_flops_per_token'] / 1e6:,.0f} executed by the {result['attention']} form)",
            f"{state}, kept for backward {result['saved_bytes'] / MIB:,.0f} MiB",
        ]
    else:
        lines = [f"{result['parameters']:,} parameters", state]
    if "note" in result:
        lines.append(result["note"])
    if device is not None:
        low, high = result["tokens_per_second"]
        short, long = result["epoch_hours"]
        whose = " of MAESTRO" if result["epoch_tokens"] == costs.MAESTRO_TRAINING_TOKENS else ""
        lines += [
            "",
            f"{device.name}: {device.memory_gib:g} GiB, {device.gigabytes_per_second:,g} GB/s ({device.source})",
            *(f"  {name:<20}{size / GIB:8.2f} GiB" for name, size in result["peak_parts"].items()),
            f"  {'peak':<20}{result['peak_bytes'] / GIB:8.2f} GiB, {'fits' if result['fits'] else 'DOES NOT FIT'} "
            f"{costs.usable_bytes(device) / GIB:.1f} GiB (a tenth is left free)",
            f"  {low:,.0f} to {high:,.0f} tokens/s at {costs.UTILISATION[0]:.0%} to {costs.UTILISATION[1]:.0%} of the "
            f"peak; an epoch of {result['epoch_tokens']:,} tokens{whose} takes {short:.2f} to {long:.2f} h"
            + ("" if "epoch_cost" not in result else " and costs {:.2f} to {:.2f}".format(*result["epoch_cost"])),
            "  bytes are arithmetic, not measured on this device: expect 15 %; the share of the peak is a guess",
        ]
    if "fit_memory" in result:
        fit = result["fit_memory"]
        lines.append(
            f"  largest budget: {fit['budget']:,} tokens, {fit['spelling']}, with {fit['num_lanes']} lanes: "
            f"{fit['peak_bytes'] / GIB:.2f} GiB; or {fit['largest_num_lanes']} lanes at the given horizons"
        )
    return "\n".join([*lines, "", *table(result)])


def table(result: dict[str, Any]) -> list[str]:
    """The rows as Markdown, and what is left out."""
    left_out = [f"{name} is left out: {reason}" for name, reason in result["absent"].items()]
    if not result["rows"]:
        return left_out
    has_device = any("peak_bytes" in row for row in result["rows"])
    header = ["row", "horizons", "state MiB", "for backward MiB", "MFLOP/token", "of full"]
    lines = ["| " + " | ".join(header + (["peak GiB", "hours/epoch"] if has_device else [])) + " |"]
    lines.append("|---" * (len(header) + 2 * has_device) + "|")
    for row in result["rows"]:
        cells = [
            f"`{row['name']}`",
            row["spelling"] or "-",
            f"{row['state_bytes'] / MIB:,.1f}",
            f"{row['saved_bytes'] / MIB:,.0f}",
            f"{row['executed_flops_per_token'] / 1e6:,.0f}",
            f"{row['flops_relative_to_full']:.2f}",
        ]
        if has_device:
            cells += [f"{row['peak_bytes'] / GIB:.2f}", "{:.2f} to {:.2f}".format(*row["epoch_hours"])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines + left_out


def hint(plan: TrainingPlan, result: dict[str, Any], arguments: list[str]) -> str:
    """The next useful command, with the options that were given."""
    if plan.device is None:
        return "dsmr estimate --device rtx-3060-12gb --trainer.precision bf16-mixed tells what a GPU would take"
    if "fit_memory" in result:
        fit = result["fit_memory"]
        given = left_out(arguments, OWN_OPTIONS + FITTED_OPTIONS)
        largest = ["--data.num_lanes", str(fit["num_lanes"]), "--model.horizons", fit["spelling"]]
        return shlex.join(["dsmr", "fit", *given, "--trainer.precision", plan.precision, *largest])
    if plan.precision == "32-true":
        return "the same with --trainer.precision bf16-mixed"
    return "the same with --fit-memory finds the largest budget"
