"""`dsmr sweep`: the trials of a sweep file, through wandb, or here and offline; or only what they would cost."""

from pathlib import Path
from typing import Any

import torch

from dsmr.benchmark.machine import commit, hardware
from dsmr.cli.options import OneLine
from dsmr.cli.report import write
from dsmr.cli.results import check_output, write_result
from dsmr.cli.sweep import spec
from dsmr.cli.sweep.local import DONE, Outcome, Stopped, run_all
from dsmr.cli.sweep.spec import Sweep, Trial
from dsmr.report.collect import collect

OWN = ("--name", "--root", "--resume", "--checkpoint", "--ckpt_path", "--json", "--output")
FLAGS = ("--local", "--dry-run", "--dry_run", "--json", "--help", "-h")
VALUED = ("--root", "--trials", "--seed", "--device", "--price-per-hour", "--price_per_hour", "--output", "--project")


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr sweep`."""
    mine, extra = split(arguments)
    options = parser().parse_args(mine)
    output = check_output(options.output)
    sweep = spec.read(Path(options.file), tuple(extra))
    if options.trials is not None and options.trials < 1:
        raise ValueError(f"--trials {options.trials} must be at least 1")
    if options.dry_run:
        from dsmr.cli.sweep.dry import dry_run

        found = spec.trials(sweep, options.trials, options.seed)
        result = dry_run(sweep, found, options.device, options.price_per_hour)
        print(f"next: dsmr sweep {options.file} --local {' '.join(extra)}".rstrip())
        write_result(result, as_json=options.json, output=output)
        return 0
    if options.device is not None or options.price_per_hour is not None:
        raise ValueError("--device and --price-per-hour belong to --dry-run")
    if not options.local:
        from dsmr.cli.sweep.remote import run_agent

        return run_agent(sweep, options.project, options.trials)
    found = spec.trials(sweep, options.trials, options.seed)
    check_trials(found)
    if "early_terminate" in sweep.content:
        print("early_terminate is for wandb; here every trial runs to its end")
    folder = Path(options.root) / sweep.name
    try:
        outcomes = run_all(sweep, found, Path(options.root), lambda line: print(line, flush=True))
    except Stopped as stopped:
        print(f"next: the same command goes on where this one stopped ({folder})")
        return stopped.status
    result = conclude(sweep, outcomes, folder)
    write_result(result, as_json=options.json, output=output)
    return 0 if all(outcome.status == DONE for outcome in outcomes) else 1


def parser() -> OneLine:
    """Options of the command itself."""
    made = OneLine(
        prog="dsmr sweep",
        description="The trials of a wandb sweep file. All other options are for dsmr fit, in every trial.",
    )
    made.add_argument("file", type=str, help="Sweep file, such as experiments/placement.yaml.")
    made.add_argument("--local", action="store_true", help="Run the trials here, without wandb, one after another.")
    made.add_argument("--dry-run", action="store_true", help="Only say which trials there are and what they take.")
    made.add_argument("--device", type=str | None, default=None, help="Of a dry run, such as rtx-3060-12gb.")
    made.add_argument("--price-per-hour", type=float | None, default=None, help="Of the device, any currency.")
    made.add_argument("--root", type=str, default="runs", help="Folder of the sweep's folder, for --local.")
    made.add_argument(
        "--trials", type=int | None, default=None, help="At most so many; a random sweep needs a number."
    )
    made.add_argument("--seed", type=int, default=0, help="Of what random trials draw.")
    made.add_argument("--project", type=str | None, default=None, help="Of wandb; None: the file's.")
    made.add_argument("--json", action="store_true", help="Results as JSON on the last line of stdout.")
    made.add_argument("--output", type=str | None, default=None, help="File for the results as JSON.")
    return made


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options of the command, and those of `dsmr fit`.

    Raises:
        ValueError: an option of `dsmr fit` that the sweep itself decides.
    """
    mine, rest, extra = arguments[:1], arguments[1:], []  # the file comes first
    while rest:
        word = rest.pop(0)
        option, has_value, _ = word.partition("=")
        if option not in FLAGS and option not in VALUED:
            extra.append(word)
            continue
        mine.append(word)
        if option in VALUED and not has_value and rest:
            mine.append(rest.pop(0))
    taken = [word for word in extra if word.partition("=")[0] in OWN]
    if taken:
        raise ValueError(f"{taken[0]} is the sweep's own to decide; leave it out")
    return mine, extra


def check_trials(trials: list[Trial]) -> None:
    """Parse the options of every trial before the first one runs.

    Raises:
        ValueError: one is wrong; with the trial's name.
    """
    from dsmr.cli.lightning import SizesCLI

    for trial in trials:
        try:
            SizesCLI("fit", list(trial.arguments))
        except ValueError as error:
            raise ValueError(f"trial {trial.name}: {error}") from error


def conclude(sweep: Sweep, outcomes: list[Outcome], folder: Path) -> dict[str, Any]:
    """Write the sweep's table and pictures, and say who was best; gives it as a result."""
    name, is_more_better = sweep.metric
    scored = [outcome for outcome in outcomes if name in outcome.figures]
    scored.sort(key=lambda outcome: outcome.figures[name], reverse=is_more_better)
    if scored:
        lines = write(collect(folder), folder, "png")
        print("\n".join(["", *(line for line in lines if not line.startswith("!"))]))
        print(f"best {name}: {scored[0].figures[name]:.4f}, {scored[0].trial.name}")
    failed = [outcome for outcome in outcomes if outcome.status != DONE]
    for outcome in failed:
        print(f"{outcome.trial.name} failed: {outcome.message}")
    if failed:
        print("the same command tries those that failed again")
    if scored:
        print(f"next: open {folder / 'README.md'}")
    return {
        "sweep": sweep.name,
        "file": str(sweep.path),
        "folder": str(folder),
        "metric": name,
        "trials": [
            {
                "name": outcome.trial.name,
                "status": outcome.status,
                "values": outcome.trial.values,
                "message": outcome.message or None,
                **outcome.figures,
            }
            for outcome in outcomes
        ],
        "best": scored[0].trial.name if scored else None,
        "commit": commit(),
        "hardware": hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
