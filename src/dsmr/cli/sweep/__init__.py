"""`dsmr sweep`: the trials of a sweep file, through wandb, or here and offline; or only what they would cost."""

import shlex
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from dsmr import UserError
from dsmr.benchmark.machine import current_commit, hardware_info
from dsmr.cli import nearest
from dsmr.cli.json_output import check_output, write_result
from dsmr.cli.options import OneLine
from dsmr.cli.report_command import write
from dsmr.cli.sweep import spec
from dsmr.cli.sweep.check import check_shared, checked
from dsmr.cli.sweep.local import Outcome, Stopped, run_all
from dsmr.cli.sweep.spec import Sweep
from dsmr.cli.sweep.state import DONE
from dsmr.results.runs import collect_results

OWN = ("--name", "--root", "--resume", "--checkpoint", "--ckpt_path", "--json", "--output")
FLAGS = ("--local", "--dry-run", "--json", "--help", "-h")
VALUED = ("--root", "--trials", "--seed", "--device", "--price-per-hour", "--output", "--project")
UNHEARD_BY_WANDB = ("--root", "--seed", "--json", "--output")
ROOT = "runs"


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr sweep`."""
    mine, extra = split(arguments)
    options = parser().parse_args(mine)
    check_options(options, mine)
    output = check_output(options.output)
    sweep = spec.read(Path(options.file), tuple(extra))
    if options.dry_run:
        from dsmr.cli.sweep.dry import dry_run

        found = spec.trials(sweep, options.trials, options.seed)
        result = dry_run(sweep, found, options.device, options.price_per_hour)
        print(f"next: {following(options, extra)}")
        write_result(result, as_json=options.json, output=output)
        return 0
    if not options.local:
        from dsmr.cli.sweep.remote import run_agent

        check_shared(sweep)
        return run_agent(sweep, options.project, options.trials)
    found = checked(spec.trials(sweep, options.trials, options.seed))
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
    return 0 if result["best"] and all(outcome.status == DONE for outcome in outcomes) else 1


def check_options(options: Namespace, given: list[str]) -> None:
    """Refuse numbers that are too small, and options that would not be heard.

    Raises:
        UserError: naming the option.
    """
    if options.trials is not None and options.trials < 1:
        raise UserError(f"--trials {options.trials} must be at least 1")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed} must be at least 0")
    if not options.dry_run and (options.device is not None or options.price_per_hour is not None):
        raise UserError("--device and --price-per-hour belong to --dry-run")
    unheard = [word for word in given if word.partition("=")[0] in UNHEARD_BY_WANDB]
    if unheard and not options.dry_run and not options.local:
        raise UserError(f"{unheard[0]}: {', '.join(UNHEARD_BY_WANDB)} belong to --local or --dry-run")


def following(options: Namespace, extra: list[str]) -> str:
    """The command that runs the trials of a dry run."""
    given = {"--trials": options.trials, "--seed": options.seed or None, "--root": options.root}
    kept = [word for option, value in given.items() if value not in (None, ROOT) for word in (option, str(value))]
    return shlex.join(["dsmr", "sweep", options.file, "--local", *kept, *extra])


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
    made.add_argument("--root", type=str, default=ROOT, help="Folder of the sweep's folder, for --local.")
    made.add_argument(
        "--trials", type=int | None, default=None, help="At most so many; a random sweep needs a number."
    )
    made.add_argument("--seed", type=int, default=0, help="Of what random trials draw.")
    made.add_argument("--project", type=str | None, default=None, help="Of wandb; None: the file's.")
    made.add_argument("--json", action="store_true", help="Results as JSON on the last line of stdout.")
    made.add_argument("--output", type=str | None, default=None, help="File for the results as JSON.")
    return made


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options of the command, its file first, and those of `dsmr fit`.

    The file is the first word that is neither an option nor the value of one.

    Raises:
        UserError: an option of `dsmr fit` that the sweep itself decides.
    """
    files: list[str] = []
    mine: list[str] = []
    extra: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        own = option.replace("_", "-")
        if own in FLAGS or own in VALUED:
            mine.append(own + equals + value)
            if own in VALUED and not equals:
                mine += rest[:1]
                del rest[:1]
        elif word.startswith("-"):
            extra.append(word)
            if not equals and rest and not rest[0].startswith("--"):
                extra.append(rest.pop(0))
        else:
            (extra if files else files).append(word)
    taken = [word for word in extra if word.partition("=")[0] in OWN]
    if taken:
        raise UserError(f"{taken[0]} is the sweep's own to decide; leave it out")
    return [*files, *mine], extra


def conclude(sweep: Sweep, outcomes: list[Outcome], folder: Path) -> dict[str, Any]:
    """Write the sweep's table and pictures, and say who was best; gives it as a result."""
    name, is_more_better = sweep.metric
    scored = [outcome for outcome in outcomes if name in outcome.figures]
    scored.sort(key=lambda outcome: outcome.figures[name], reverse=is_more_better)
    done = [outcome for outcome in outcomes if outcome.status == DONE]
    names = sorted({figure for outcome in done for figure in outcome.figures if "/" in figure})
    has_table = any(outcome.figures for outcome in done)
    if has_table:
        lines = write(collect_results(folder), folder, "png")
        print("\n".join(["", *(line for line in lines if not line.startswith("!"))]))
    if scored:
        print(f"best {name}: {scored[0].figures[name]:.4f}, {scored[0].trial.name}")
    elif done:
        print(f"metric {name} was not logged{nearest(name, names)}; there are {', '.join(names) or 'no figures here'}")
    failed = [outcome for outcome in outcomes if outcome.status != DONE]
    for outcome in failed:
        print(f"{outcome.trial.name} failed: {outcome.message}")
    if failed:
        print("the same command tries those that failed again")
    if has_table:
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
        "commit": current_commit(),
        "hardware": hardware_info(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
