"""Sweep files in the format of Weights & Biases, and their trials.

https://docs.wandb.ai/guides/sweeps/sweep-config-keys describes the format. Nested parameters are joined by dots, as
LightningCLI spells them. Trials that run here take their values from `value` and `values`; ranges and distributions
are left to wandb.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dsmr import UserError
from dsmr.cli import nearest
from dsmr.cli.config_files import FOLDER, SWEEPS, check_yaml, find_config, location_of_key

METHODS = ("grid", "random", "bayes")
KEYS = (
    *("program", "method", "parameters", "command", "name", "description", "project", "entity", "metric", "run_cap"),
    *("early_terminate", "controller"),
)
ARGUMENTS = "${args}"
CONFIGS = ("--config", "-c")
IGNORED_WORDS = ("${env}", "${interpreter}")
NAME_LENGTH = 80
Refuse = Callable[[str, str], UserError]


@dataclass(frozen=True)
class Sweep:
    """A sweep file."""

    path: Path
    name: str  # from the file, or the file's stem
    content: dict[str, Any]  # of the file, with parameters by their dotted keys
    options: tuple[str, ...]  # of `dsmr fit`, before those of a trial

    @property
    def metric(self) -> tuple[str, bool]:
        """Name of the metric that ranks trials, and True if larger is better."""
        metric = self.content.get("metric") or {}
        return metric.get("name", "val/perplexity"), metric.get("goal", "minimize") == "maximize"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str  # of its folder, from what it varies
    values: dict[str, Any] = field(hash=False)  # of all parameters, by dotted key
    arguments: tuple[str, ...]  # of `dsmr fit`, without `--root` and `--name`
    fingerprint: str | None = None  # hash of all settings that decide the result; None where they were not parsed


def shipped_sweeps() -> list[str]:
    """Return the names of the shipped sweep files."""
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def find_sweep(given: str) -> Path:
    """Return the sweep file of a path or a shipped name."""
    if Path(given).is_file():
        return Path(given)
    names = shipped_sweeps()
    if given not in names:
        hint = nearest(given, names)
        raise UserError(f"sweep file {given}: no such file or shipped sweep{hint}; shipped: {', '.join(names)}")
    return SWEEPS / f"{given}.yaml"


def read_sweep(path: Path, extra: tuple[str, ...] = ()) -> Sweep:
    """Read and check a sweep file; `extra` are further options of `dsmr fit`, for all trials.

    Config files come before the file's own options, other options after them, and what a trial varies last.
    """
    content = yaml.safe_load(check_yaml(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a sweep file: it must have keys such as program, method and parameters")

    def refuse(key: str, message: str) -> UserError:
        return UserError(f"{key}{location_of_key(key, path)}: {message}")

    check_keys(path, content, refuse)
    parameters = dict(flatten_parameters(content["parameters"], "", refuse))
    options = command_options(content.get("command"), refuse)
    name = str(content.get("name") or path.stem)
    if "/" in name or name in (".", ".."):
        raise refuse("name", f"{name!r} must be the name of one folder; choose where it is with --root")
    configs, others = split_configs(extra)
    varied = [word for word in others if word.partition("=")[0].removeprefix("--") in parameters]
    if varied:
        raise UserError(f"{varied[0]} is varied by the sweep; leave it out, or change it in {path}")
    return Sweep(path, name, {**content, "parameters": parameters}, (*configs, *options, *others))


def check_keys(path: Path, content: Mapping[str, Any], refuse: Refuse) -> None:
    """Check the keys of a sweep file other than its parameters and its command."""
    for key in content:
        if key not in KEYS:
            raise refuse(str(key), f"unknown key of a sweep{nearest(str(key), KEYS)}; known: {', '.join(KEYS)}")
    examples = {"program": "dsmr", "method": "grid", "parameters": "{seed_everything: {values: [0, 1]}}"}
    for key, example in examples.items():
        if not content.get(key):
            raise UserError(f"{path} has no {key}; add, for example, {key}: {example}")
    if content["program"] != "dsmr":
        raise refuse("program", f"{content['program']!r} is not dsmr, which runs the trials")
    if content["method"] not in METHODS:
        raise refuse("method", f"{content['method']!r} is not one of {', '.join(METHODS)}")
    metric = content.get("metric", {})
    if not isinstance(metric, dict) or not metric.keys() <= {"name", "goal", "target"}:
        raise refuse("metric", "give {name: val/perplexity, goal: minimize}")
    if metric.get("goal", "minimize") not in ("minimize", "maximize"):
        raise refuse("goal", f"{metric['goal']!r} is not one of minimize, maximize")
    cap = content.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or cap < 1):
        raise refuse("run_cap", f"{cap!r} is not a positive number of trials")
    if not isinstance(content["parameters"], dict):
        raise refuse("parameters", "must map keys such as model.horizons to {values: [...]}")


def flatten_parameters(
    parameters: Mapping[str, Any], prefix: str, refuse: Refuse
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the specification of each parameter with its dotted key."""
    for key, given in parameters.items():
        if not isinstance(given, dict):
            raise refuse(str(key), f"must say which values it takes, for example {{value: {given}}}")
        if "parameters" in given:
            nested = given["parameters"]
            if not isinstance(nested, dict) or not nested:
                raise refuse(str(key), "nested parameters must map keys to their values, such as {lr: {value: 0.001}}")
            yield from flatten_parameters(nested, f"{prefix}{key}.", refuse)
            continue
        if "values" in given and (not isinstance(given["values"], list) or not given["values"]):
            raise refuse(str(key), "values must be a list of at least one")
        yield f"{prefix}{key}", given


def split_configs(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split options into config files and all others."""
    configs, others = list[str](), list[str]()
    for before, word in zip(["", *options], options, strict=False):
        is_config = word.partition("=")[0] in CONFIGS or before in CONFIGS
        (configs if is_config else others).append(word)
    return configs, others


def command_options(command: Any, refuse: Refuse) -> tuple[str, ...]:
    """Return the options of `dsmr fit` in a command block."""
    wanted = 'give command: [dsmr, fit, "${args}"]'
    if not isinstance(command, list) or not all(isinstance(word, str | int | float) for word in command):
        raise refuse("command", wanted)
    words = [str(word).replace("${program}", "dsmr") for word in command if word not in IGNORED_WORDS]
    if words[:2] != ["dsmr", "fit"] or words.count(ARGUMENTS) != 1:
        raise refuse("command", f"{wanted}, with {ARGUMENTS} once, where the trial's own options go")
    macro = next((word for word in words if "${" in word and word != ARGUMENTS), None)
    if macro:
        raise refuse("command", f"{macro} is not supported here; {wanted}")
    if words[-1] != ARGUMENTS:
        raise refuse("command", f"{ARGUMENTS} must come last, so that nothing overrides what a trial varies")
    return tuple(words[2:-1])


def make_trials(sweep: Sweep, count: int | None = None, seed: int = 0) -> list[Trial]:
    """Return the trials of a grid, the first parameter changing slowest, or random ones, at most `count`.

    The n-th random trial and its name do not depend on `count`, whose default is the file's `run_cap`.
    """
    count = sweep.content.get("run_cap") if count is None else count
    method, parameters = sweep.content["method"], sweep.content["parameters"]
    if method == "bayes":
        raise UserError(f"{sweep.path}: method bayes needs wandb, which decides; leave out --local, or use random")
    for key, given in parameters.items():
        if given.keys() not in ({"value"}, {"values"}):
            raise UserError(
                f"{key} ({sweep.path}): here a parameter takes value or values; leave out --local, so that wandb "
                "draws from ranges and distributions, or list values"
            )
    lists = [given["values"] if "values" in given else [given["value"]] for given in parameters.values()]
    if method == "grid":
        combinations = list(itertools.product(*lists))[:count]
    elif count is None:
        raise UserError(f"{sweep.path}: a random sweep has no end; give --trials N, or run_cap in the file")
    else:  # a generator for each value, so that more trials or parameters change none of the others

        def draw(n: int, k: int) -> Any:
            return lists[k][int(np.random.default_rng([seed, n, k]).choice(len(lists[k])))]

        combinations = [tuple(draw(n, k) for k in range(len(lists))) for n in range(count)]
    varied = [key for key, given in parameters.items() if "values" in given]
    trials, taken = [], set[str]()
    for combination in combinations:
        values = dict(zip(parameters, combination, strict=True))
        name = unique_name(trial_name(sweep, values, varied), taken)
        arguments = [f"--{key}={as_option(value)}" for key, value in values.items()]
        trials.append(Trial(name, values, (*without_wandb(sweep.options), *arguments)))
    return trials


def unique_name(name: str, taken: set[str]) -> str:
    """Return the name, or the first free one of NAME-2, NAME-3, ..., and add it to `taken`."""
    free = next(n for n in itertools.chain([name], (f"{name}-{k}" for k in itertools.count(2))) if n not in taken)
    taken.add(free)
    return free


def without_wandb(options: tuple[str, ...]) -> list[str]:
    """Return options without wandb's logger: a trial that runs here logs to its own folder."""
    kept: list[str] = []
    for word in options:
        option, _, value = word.partition("=")
        if kept and kept[-1] in CONFIGS and is_wandb(word):
            kept.pop()
        elif option not in CONFIGS or not is_wandb(value):
            kept.append(word)
    return kept


def is_wandb(config: str) -> bool:
    """Return True for the shipped config that logs to wandb, given by name or by path."""
    try:
        return bool(config) and find_config(config).samefile(FOLDER / "trainer" / "wandb.yaml")
    except ValueError:  # an unknown config is reported when the trials are parsed
        return False


def trial_name(sweep: Sweep, values: Mapping[str, Any], varied: list[str]) -> str:
    """Return the name of a trial's folder: what it varies, by the last word of each key where that is unambiguous."""
    last = [key.rpartition(".")[2] for key in varied]
    parts = []
    for key, word in zip(varied, last, strict=True):
        text = as_option(values[key])
        text = Path(text).stem if text.endswith((".yaml", ".yml")) else text
        value = re.sub(r"[^A-Za-z0-9.+_-]+", "_", text).strip("_")
        label = (key if last.count(word) > 1 else word).replace("seed_everything", "seed")
        parts.append(value if word == "config" else f"{label}={value}")
    name = ",".join(parts) or sweep.name
    if len(name) <= NAME_LENGTH:
        return name
    return f"{name[: NAME_LENGTH - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def as_option(value: Any) -> str:
    """Return a value as the command line spells it."""
    return value if isinstance(value, str) else json.dumps(value)
