"""Estimated costs of every variant at the sizes of a planned run, beside the full reference."""

from typing import Any

import torch

from dsmr.benchmark.variants import WINDOW_SEGMENTS, VariantSizes, build_network, variant_rows
from dsmr.cost import GIB, MIB
from dsmr.cost.estimate import TrainingPlan, estimate_training
from dsmr.model.blocks import Decoder
from dsmr.model.horizons import format_horizons
from dsmr.results.tables import table_lines


def estimate_variants(plan: TrainingPlan, epoch_tokens: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Estimate all variants at the plan's sizes and budget, full first and the plan's own network last.

    Also returns the reasons for variants that are left out.
    """
    network = plan.network
    budget = sum(network.horizons)
    if not budget:
        return [], {"every other row": "the configuration keeps no memory whose budget the others could spend"}
    sizes = VariantSizes(len(network.blocks), network.segment_length, budget, network.memory_block)
    known, absent = variant_rows(sizes)
    rows: list[dict[str, Any]] = []
    for name, row in known.items():
        lanes = max(plan.num_lanes // WINDOW_SEGMENTS, 1) if row.windows else plan.num_lanes
        with torch.device("meta"):
            variant: Decoder = build_network(row, network, prefix_length=sizes.full_horizon)
        costs = estimate_training(TrainingPlan(variant, lanes, plan.precision, plan.device), epoch_tokens)
        spelling = format_horizons(row.horizons) if row.horizons else None
        rows.append({"name": name, "spelling": spelling, **{k: v for k, v in costs.items() if k != "peak_parts"}})
    costs = estimate_training(plan, epoch_tokens)
    own = {"name": "configured", "spelling": format_horizons(network.horizons)}
    rows.append(own | {key: value for key, value in costs.items() if key != "peak_parts"})
    for one in rows:
        one["flops_relative_to_full"] = one["executed_flops_per_token"] / rows[0]["executed_flops_per_token"]
    return rows, absent


def variant_costs_table(rows: list[dict[str, Any]], absent: dict[str, str]) -> list[str]:
    """Format the rows of `estimate_variants` as Markdown, with a line for each variant that is left out."""
    left_out = [f"{name} is left out: {reason}" for name, reason in absent.items()]
    if not rows:
        return left_out
    has_device = any("peak_bytes" in row for row in rows)
    table = [["row", "horizons", "state MiB", "for backward MiB", "MFLOP/token", "of full"]]
    table[0] += ["peak GiB", "hours/epoch"] if has_device else []
    for row in rows:
        cells = [
            f"`{row['name']}`",
            row["spelling"] or "-",
            f"{row['state_bytes'] / MIB:,.1f}",
            f"{row['saved_bytes'] / MIB:,.0f}",
            format_mflop(row["executed_flops_per_token"]),
            f"{row['flops_relative_to_full']:.2f}",
        ]
        if has_device:
            cells += [f"{row['peak_bytes'] / GIB:.2f}", "{:.2f} to {:.2f}".format(*row["epoch_hours"])]
        table.append(cells)
    return table_lines(table) + left_out


def format_mflop(flops: float) -> str:
    """Return millions of operations, with decimals for small networks."""
    return f"{flops / 1e6:,.0f}" if flops >= 1e8 else f"{flops / 1e6:.2f}"
