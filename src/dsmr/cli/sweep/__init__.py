"""`dsmr sweep`: run the trials of a sweep file through wandb or on this machine, or estimate what they would take."""

import os
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from dsmr import UserError
from dsmr.benchmark.machine import current_commit, hardware_info
from dsmr.cli import nearest
from dsmr.cli.common_options import JSON, Options, add_options, check_output, write_result
from dsmr.cli.config_files import config_values
from dsmr.cli.parser import OneLineParser, underscored
from dsmr.cli.sweep.local import Outcome, Stopped, run_trials
from dsmr.cli.sweep.spec import ARGUMENTS, Sweep, find_sweep, is_wandb, make_trials, read_sweep, shipped_sweeps
from dsmr.cli.sweep.state import DONE, check_shared, checked
from dsmr.results.report import write_report
from dsmr.results.runs import collect_results

FORBIDDEN = ("--name", "--root", "--resume", "--checkpoint", "--ckpt_path", "--json", "--output")
ROOT = "runs"
OPTIONS: Options = {
    "--local": (None, False, "Run the trials on this machine, without wandb."),
    "--dry_run": (None, False, "List the trials and estimate what they take."),
    "--device": (str | None, None, "GPU of a dry run, such as rtx-3060-12gb."),
    "--price_per_hour": (float | None, None, "Price of the GPU, any currency."),
    "--root": (str, ROOT, "Folder of the sweep's folder, for --local."),
    "--trials": (int | None, None, "Maximum number of trials; required for a random sweep."),
    "--jobs": (int, 1, "Trials to run at the same time, for --local."),
    "--seed": (int, 0, "Random seed of a random sweep."),
    "--project": (str | None, None, "Project in wandb (default: the file's)."),
    **JSON,
    "--output": (str | None, None, "Write results as JSON to this file."),
}
FLAGS = ("--local", "--dry_run", "--json", "--help", "-h")
NOT_FOR_WANDB = ("--root", "--seed", "--json", "--output")


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr sweep`."""
    own, extra = split_options(arguments)
    description = "Run the trials of a wandb sweep file. All other options go to dsmr fit, in every trial."
    parser = OneLineParser("dsmr sweep", description)
    text = f"Sweep file, or the name of a shipped one: {', '.join(shipped_sweeps())}."
    parser.add_argument("file", type=str, help=text)
    add_options(parser, OPTIONS)
    options = parser.parse_args(own)
    check_options(options, own)
    output = check_output(options.output)
    sweep = read_sweep(find_sweep(options.file), tuple(extra))
    if options.dry_run:
        from dsmr.cli.sweep.dry import dry_run

        trials = make_trials(sweep, options.trials, options.seed)
        result = dry_run(sweep, trials, options.device, options.price_per_hour)
        print(f"next: {local_command(options, extra)}")
        write_result(result, as_json=options.json, output=output)
        return 0
    if not options.local:
        check_shared(sweep)
        return run_agent(sweep, options.project, options.trials)
    trials = checked(make_trials(sweep, options.trials, options.seed))
    if "early_terminate" in sweep.content:
        print("early_terminate is for wandb; here every trial runs to its end")
    if options.jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // options.jobs, 1)))
    folder = Path(options.root) / sweep.name
    try:
        tell = partial(print, flush=True)
        outcomes = run_trials(sweep, trials, Path(options.root), tell, num_jobs=options.jobs)
    except Stopped as stopped:
        print(f"next: re-run the same command to resume ({folder})")
        return stopped.status
    write_result(result := conclude(sweep, outcomes, folder), as_json=options.json, output=output)
    return 0 if result["best"] and all(outcome.status == DONE for outcome in outcomes) else 1


def check_options(options: Namespace, given: list[str]) -> None:
    """Refuse numbers that are out of range, and options that would have no effect."""
    for name, value, least in (("trials", options.trials, 1), ("jobs", options.jobs, 1), ("seed", options.seed, 0)):
        if value is not None and value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    if not options.dry_run and (options.device is not None or options.price_per_hour is not None):
        raise UserError("--device and --price_per_hour belong to --dry_run")
    if options.jobs > 1 and not options.local and not options.dry_run:
        raise UserError("--jobs belongs to --local")
    ignored = next((word for word in given if word.partition("=")[0] in NOT_FOR_WANDB), None)
    if ignored and not options.dry_run and not options.local:
        raise UserError(f"{ignored}: {', '.join(NOT_FOR_WANDB)} belong to --local or --dry_run")


def local_command(options: Namespace, extra: list[str]) -> str:
    """Return the command that runs the trials of a dry run."""
    given = {"--trials": options.trials, "--seed": options.seed or None, "--root": options.root}
    if options.jobs > 1:
        given["--jobs"] = options.jobs
    kept = [word for option, value in given.items() if value not in (None, ROOT) for word in (option, str(value))]
    return shlex.join(["dsmr", "sweep", options.file, "--local", *kept, *extra])


def split_options(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split the command line into the command's own options, its file first, and those of `dsmr fit`.

    The file is the first word that is neither an option nor an option's value.
    """
    files, mine, extra = list[str](), list[str](), list[str]()
    rest = underscored(arguments)
    while rest:
        word = rest.pop(0)
        option, equals, _ = word.partition("=")
        if option in FLAGS or option in OPTIONS:
            mine.append(word)
            if option not in FLAGS and not equals:
                mine += rest[:1]
                del rest[:1]
        elif word.startswith("-"):
            extra.append(word)
            if not equals and rest and not rest[0].startswith("--"):
                extra.append(rest.pop(0))
        else:
            (extra if files else files).append(word)
    for word in extra:
        if word.partition("=")[0] in FORBIDDEN:
            raise UserError(f"{word} is set by the sweep itself; leave it out")
    return [*files, *mine], extra


def conclude(sweep: Sweep, outcomes: list[Outcome], folder: Path) -> dict[str, Any]:
    """Write the sweep's table and plots, print the best trial, and return the result."""
    name, is_more_better = sweep.metric
    scored = [one for one in outcomes if name in one.metrics]
    scored.sort(key=lambda one: one.metrics[name], reverse=is_more_better)
    done = [outcome for outcome in outcomes if outcome.status == DONE]
    names = sorted({metric for outcome in done for metric in outcome.metrics if "/" in metric})
    has_table = any(outcome.metrics for outcome in done)
    if has_table:
        lines = write_report(collect_results(folder), folder, "png")
        print("\n".join(["", *(line for line in lines if not line.startswith("!"))]))
    if scored:
        print(f"best {name}: {scored[0].metrics[name]:.4f}, {scored[0].trial.name}")
    elif done:
        print(f"metric {name} was not logged{nearest(name, names)}; logged: {', '.join(names) or 'nothing here'}")
    for outcome in outcomes:
        if outcome.status != DONE:
            print(f"{outcome.trial.name} failed: {outcome.message}")
    if len(done) < len(outcomes):
        print("re-run the same command to retry the failed trials")
    if has_table:
        print(f"next: open {folder / 'README.md'}")
    about = {"sweep": sweep.name, "file": str(sweep.path), "folder": str(folder), "metric": name}
    return about | {
        "trials": [
            {"name": one.trial.name, "status": one.status, "values": one.trial.values, "message": one.message or None}
            | one.metrics
            for one in outcomes
        ],
        "best": scored[0].trial.name if scored else None,
        "commit": current_commit(),
        "hardware": hardware_info(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }


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
    project, entity = project or sweep.content.get("project") or "dsmr", sweep.content.get("entity")
    try:
        sweep_id = wandb.sweep(wandb_content(sweep), project=project, entity=entity)
        print(f"sweep {sweep_id} in project {project}")
        print(f"further machines join with: wandb agent {project}/{sweep_id}")
        wandb.agent(sweep_id, project=project, entity=entity, count=count)
    except Exception as error:  # wandb raises errors of its own, of requests and of its agent
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"wandb: {reason}; log in with wandb login, or run the trials here with --local") from error
    print("next: dsmr report runs")
    return 0
