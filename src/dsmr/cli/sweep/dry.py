"""Dry runs: what every trial of a sweep would take, by the cost model of `dsmr estimate`."""

from typing import Any

from dsmr import UserError
from dsmr.cli.estimate_command import precision_of
from dsmr.cli.lightning_cli import SizesCLI
from dsmr.cli.sweep.spec import Sweep, Trial
from dsmr.cost import GIB, MIB
from dsmr.cost import estimate as costs
from dsmr.cost.devices import Device, find_device
from dsmr.cost.estimate import TrainingPlan
from dsmr.model.blocks import Decoder
from dsmr.model.horizons import format_horizons
from dsmr.results.tables import table_lines


def dry_run(sweep: Sweep, trials: list[Trial], device_name: str | None, price: float | None) -> dict[str, Any]:
    """Print a table of all trials with their total, and return it as a result."""
    device = None if device_name is None else find_device(device_name)
    if device is None and price is not None:
        raise UserError("--price_per_hour needs a --device, for example --device rtx-3060-12gb")
    rows = [estimate_trial(trial, device) for trial in trials]
    total = [sum(r["hours"][k] for r in rows) for k in (0, 1)] if device and all("hours" in r for r in rows) else None
    print("\n".join(format_table(rows, device, total, price)))
    return {"sweep": sweep.name, "device": device and device.name, "trials": rows, "total_hours": total}


def estimate_trial(trial: Trial, device: Device | None) -> dict[str, Any]:
    """Estimate one trial."""
    try:
        cli = SizesCLI("fit", list(trial.arguments))
        trainer, data, network = cli.config.trainer, cli.datamodule, cli.model.backbone
        devices = trainer.devices if isinstance(trainer.devices, int) else 1
        precision = precision_of(trainer.precision)
        if isinstance(network, Decoder):
            plan = TrainingPlan(network, data.num_lanes, precision, device)
            estimated = costs.estimate_training(plan, costs.MAESTRO_TRAINING_TOKENS)
        else:
            estimated = costs.estimate_unknown_network(network, data.num_lanes, precision, device)
    except ValueError as error:
        raise UserError(f"trial {trial.name}: {error}") from error
    per_step = data.num_lanes * data.segment_length * int(trainer.accumulate_grad_batches or 1) * devices
    horizons = format_horizons(network.horizons) if network.horizons else None
    found: dict[str, Any] = {"name": trial.name, "values": trial.values, "horizons": horizons}
    found |= {key: estimated[key] for key in ("budget", "parameters", "state_bytes")}
    if trainer.max_steps > 0:
        found["tokens"] = trainer.max_steps * per_step
    elif trainer.max_epochs and trainer.max_epochs > 0:
        found["tokens"] = trainer.max_epochs * costs.MAESTRO_TRAINING_TOKENS
    if device is not None:
        found |= {"peak_bytes": estimated["peak_bytes"], "fits": estimated["fits"]}
        if "tokens" in found:
            slow, fast = estimated["tokens_per_second"]
            found["hours"] = [found["tokens"] / devices / speed / 3600 for speed in (fast, slow)]
    return found


def format_hours(low: float, high: float) -> str:
    """Format a range of hours, in minutes below one hour."""
    return f"{60 * low:.1f} to {60 * high:.1f} minutes" if high < 1 else f"{low:.1f} to {high:.1f} hours"


def format_table(
    rows: list[dict[str, Any]], device: Device | None, total: list[float] | None, price: float | None
) -> list[str]:
    """Format the table and the total."""
    table = [["trial", "horizons", "budget", "tokens", "state MiB"] + (["peak GiB", "time"] if device else [])]
    for found in rows:
        tokens = f"{found['tokens']:,}" if "tokens" in found else "unlimited"
        state = f"{found['state_bytes'] / MIB:,.1f}"
        cells = [f"`{found['name']}`", found["horizons"] or "-", f"{found['budget']:,}", tokens, state]
        if device:
            cells.append(f"{found['peak_bytes'] / GIB:.2f}" + ("" if found["fits"] else " DOES NOT FIT"))
            cells.append(format_hours(*found["hours"]) if "hours" in found else "unlimited")
        table.append(cells)
    lines = [*table_lines(table), f"{len(rows)} trials"]
    if device is None:
        lines.append("add --device, such as rtx-3060-12gb, for memory and hours")
    elif total is None:
        lines.append("some trials have no limit: give --trainer.max_steps")
    else:
        cost = "" if price is None else f", {total[0] * price:.2f} to {total[1] * price:.2f} in total"
        lines.append(f"{format_hours(*total)} of training in total on {device.name}{cost}, without validation")
        lines.append("times assume a guessed share of the device's peak, see dsmr estimate")
    return lines
