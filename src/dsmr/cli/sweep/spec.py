"""A sweep file, as Weights & Biases defines it, and the trials that it asks for.

https://docs.wandb.ai/guides/sweeps/sweep-config-keys has the format. Nested parameters are joined by dots, as
LightningCLI spells them.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dsmr import UserError
from dsmr.cli import nearest
from dsmr.cli.configs import FOLDER, check_yaml, find_config
from dsmr.cli.options import place
from dsmr.cli.sweep.parameters import DRAWN, Refuse, Value, distribution, drawn, flattened, is_listed

METHODS = ("grid", "random", "bayes")
KEYS = (
    *("program", "method", "parameters", "command", "name", "description", "project", "entity", "metric", "run_cap"),
    *("early_terminate", "controller"),
)
ARGUMENTS = "${args}"
CONFIGS = ("--config", "-c")
NOTHING = ("${env}", "${interpreter}")
NAME_LENGTH = 80


@dataclass(frozen=True)
class Sweep:
    """A sweep file.

    Attributes:
        path: of the file.
        name: from the file, or the file's own.
        content: of the file, with parameters by their dotted keys.
        options: of `dsmr fit`, before those of a trial.
    """

    path: Path
    name: str
    content: dict[str, Any]
    options: tuple[str, ...]

    @property
    def method(self) -> str:
        """grid, random or bayes."""
        return str(self.content["method"])

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """By dotted key: what values it takes."""
        parameters: dict[str, dict[str, Any]] = self.content["parameters"]
        return parameters

    @property
    def metric(self) -> tuple[str, bool]:
        """The figure that tells trials apart, and whether more of it is better."""
        metric = self.content.get("metric") or {}
        return metric.get("name", "val/perplexity"), metric.get("goal", "minimize") == "maximize"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: of its folder, from what it varies.
        values: of all parameters, by dotted key.
        arguments: of `dsmr fit`, without `--root` and `--name`.
        fingerprint: of all settings that decide the result; None where they were not parsed.
    """

    name: str
    values: dict[str, Value] = field(hash=False)
    arguments: tuple[str, ...]
    fingerprint: str | None = None


def read(path: Path, extra: tuple[str, ...] = ()) -> Sweep:
    """Read and check a sweep file.

    Args:
        path: of the file.
        extra: options of `dsmr fit` for all trials: config files come before the file's own options, all others
            after them; what a trial varies is last.

    Raises:
        UserError: the file is missing, or a key or value in it is wrong; with file and line.
    """
    if not path.is_file():
        raise UserError(f"sweep file {path}: no such file; experiments/*.yaml has some")
    content = yaml.safe_load(check_yaml(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{path} is no sweep file: it must have keys such as program, method and parameters")

    def refuse(key: str, message: str) -> UserError:
        return UserError(f"{key}{place(key, [path]) or f' ({path})'}: {message}")

    for key in content:
        if key not in KEYS:
            raise refuse(str(key), f"unknown key of a sweep{nearest(str(key), KEYS)}; known: {', '.join(KEYS)}")
    for key, example in {
        "program": "dsmr",
        "method": "grid",
        "parameters": "{seed_everything: {values: [0, 1]}}",
    }.items():
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
        raise refuse("run_cap", f"{cap!r} is no number of trials from 1 on")
    if not isinstance(content["parameters"], dict):
        raise refuse("parameters", "must map keys such as model.horizons to {values: [...]}")
    parameters = dict(flattened(content["parameters"], "", refuse))
    options = command_options(content.get("command"), refuse)
    name = str(content.get("name") or path.stem)
    if "/" in name or name in (".", ".."):
        raise refuse("name", f"{name!r} must be the name of one folder; --root says where it is")
    configs, others = parted(extra)
    ours = [word for word in others if word.partition("=")[0].removeprefix("--") in parameters]
    if ours:
        raise UserError(f"{ours[0]} is what the sweep varies; leave it out, or change it in {path}")
    return Sweep(path, name, {**content, "parameters": parameters}, (*configs, *options, *others))


def parted(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Config files, which set what a sweep file then changes, and all other options."""
    configs: list[str] = []
    others: list[str] = []
    for before, word in zip(["", *options], options, strict=False):
        is_config = word.partition("=")[0] in CONFIGS or before in CONFIGS
        (configs if is_config else others).append(word)
    return configs, others


def command_options(command: Any, refuse: Refuse) -> tuple[str, ...]:
    """Options of `dsmr fit` in a command block."""
    wanted = 'give command: [dsmr, fit, "${args}"]'
    if not isinstance(command, list) or not all(isinstance(word, str | int | float) for word in command):
        raise refuse("command", wanted)
    words = [str(word).replace("${program}", "dsmr") for word in command if word not in NOTHING]
    if words[:2] != ["dsmr", "fit"] or words.count(ARGUMENTS) != 1:
        raise refuse("command", f"{wanted}, with {ARGUMENTS} once, where the trial's own options go")
    macro = next((word for word in words if "${" in word and word != ARGUMENTS), None)
    if macro:
        raise refuse("command", f"{macro} is not supported here; {wanted}")
    if words[-1] != ARGUMENTS:
        raise refuse("command", f"{ARGUMENTS} must come last, so that nothing overrides what a trial varies")
    return tuple(words[2:-1])


def trials(sweep: Sweep, count: int | None = None, seed: int = 0) -> list[Trial]:
    """Trials of a grid, the first parameter changing slowest, or so many random ones.

    Args:
        sweep: grid or random.
        count: at most so many; None means all of a grid, or a random sweep's `run_cap`.
        seed: of random ones: the n-th trial and its name do not depend on how many there are.

    Raises:
        UserError: a method or a distribution that needs wandb, or no number of random trials.
    """
    count = sweep.content.get("run_cap") if count is None else count
    if sweep.method == "bayes":
        raise UserError(f"{sweep.path}: method bayes needs wandb, which decides; leave out --local, or use random")
    if sweep.method == "random":
        if count is None:
            raise UserError(f"{sweep.path}: a random sweep has no end; give --trials N, or run_cap in the file")
        for key, given in sweep.parameters.items():
            if not is_listed(given) and distribution(given) not in DRAWN:
                raise UserError(
                    f"{key} ({sweep.path}): {distribution(given)} needs wandb, which draws it; leave out --local, or "
                    f"use one of {', '.join(DRAWN)}"
                )
        chosen = [
            {
                key: drawn(given, np.random.default_rng([seed, n, k]))
                for k, (key, given) in enumerate(sweep.parameters.items())
            }
            for n in range(count)
        ]
    else:
        for key, given in sweep.parameters.items():
            if not is_listed(given):
                raise UserError(f"{key} ({sweep.path}): a grid needs values; {distribution(given)} is for random")
        lists = [given.get("values", [given.get("value")]) for given in sweep.parameters.values()]
        chosen = [dict(zip(sweep.parameters, values, strict=True)) for values in itertools.product(*lists)][:count]
    varied = [key for key, given in sweep.parameters.items() if "value" not in given]
    made, taken = [], set[str]()
    for values in chosen:
        name = unique(name_of(sweep, values, varied), taken)
        arguments = [f"--{key}={spelt(value)}" for key, value in values.items()]
        made.append(Trial(name, values, (*locally(sweep.options), *arguments)))
    return made


def unique(name: str, taken: set[str]) -> str:
    """The name, or with -2, -3, ... the first that is free; taken from then on."""
    own = next(n for n in itertools.chain([name], (f"{name}-{k}" for k in itertools.count(2))) if n not in taken)
    taken.add(own)
    return own


def locally(options: tuple[str, ...]) -> list[str]:
    """Options without the logger of wandb: a trial that runs here logs to its own folder."""
    kept: list[str] = []
    for word in options:
        option, _, value = word.partition("=")
        if kept and kept[-1] in CONFIGS and is_wandb(word):
            kept.pop()
        elif option not in CONFIGS or not is_wandb(value):
            kept.append(word)
    return kept


def is_wandb(config: str) -> bool:
    """Whether a config is the shipped one that logs to wandb, by name or by path."""
    try:
        return bool(config) and find_config(config).samefile(FOLDER / "trainer" / "wandb.yaml")
    except ValueError:  # no such config, which is told where the trials are parsed
        return False


def name_of(sweep: Sweep, values: Mapping[str, Value], varied: list[str]) -> str:
    """A trial's folder, from what it varies; the last word of a key, where that says which key it is."""
    last = [key.rpartition(".")[2] for key in varied]
    parts = []
    for key, word in zip(varied, last, strict=True):
        text = spelt(values[key])
        text = Path(text).stem if text.endswith((".yaml", ".yml")) else text
        value = re.sub(r"[^A-Za-z0-9.+_-]+", "_", text).strip("_")
        label = (key if last.count(word) > 1 else word).replace("seed_everything", "seed")
        parts.append(value if word == "config" else f"{label}={value}")
    name = ",".join(parts) or sweep.name
    if len(name) <= NAME_LENGTH:
        return name
    return f"{name[: NAME_LENGTH - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def spelt(value: Value) -> str:
    """A value on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
