"""Sweeps through Weights & Biases: create the sweep and run an agent for its trials."""

import shutil
from typing import Any

from dsmr import UserError
from dsmr.cli.config_files import config_values
from dsmr.cli.sweep.spec import ARGUMENTS, Sweep, is_wandb


def wandb_content(sweep: Sweep) -> dict[str, Any]:
    """Return the sweep for wandb: dotted keys, and the options of the command line in the command block."""
    return {**sweep.content, "name": sweep.name, "command": ["dsmr", "fit", *sweep.options, ARGUMENTS]}


def logs_to_wandb(sweep: Sweep) -> bool:
    """Return True if the options that all trials share include a wandb logger."""
    options = list(sweep.options)
    return any(map(is_wandb, config_values(options))) or any("WandbLogger" in option for option in options)


def run_agent(sweep: Sweep, project: str | None, count: int | None) -> int:
    """Create the sweep and run its trials until none is left."""
    import wandb

    if wandb.setup().settings.mode in ("offline", "disabled"):
        raise UserError("WANDB_MODE keeps this machine offline; use --local, which needs no wandb")
    if shutil.which("dsmr") is None:
        raise UserError("wandb's agent does not find dsmr; put it on the PATH: source .venv/bin/activate")
    if not logs_to_wandb(sweep):
        raise UserError(f"{sweep.path}: command has no logger for wandb; add --config, wandb before {ARGUMENTS}")
    project = project or sweep.content.get("project") or "dsmr"
    try:
        sweep_id = wandb.sweep(wandb_content(sweep), project=project, entity=sweep.content.get("entity"))
        print(f"sweep {sweep_id} in project {project}")
        print(f"further machines join with: wandb agent {project}/{sweep_id}")
        wandb.agent(sweep_id, project=project, entity=sweep.content.get("entity"), count=count)
    except Exception as error:  # wandb raises errors of its own, of requests and of its agent
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"wandb: {reason}; log in with wandb login, or run the trials here with --local") from error
    print("next: dsmr report runs")
    return 0
