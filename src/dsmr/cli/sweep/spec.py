"""A sweep file, as Weights & Biases defines it, and the trials that it asks for.

https://docs.wandb.ai/guides/sweeps/sweep-config-keys has the format. Nested parameters are joined by dots, as
LightningCLI spells them.
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

from dsmr.cli import nearest
from dsmr.cli.configs import check_yaml
from dsmr.cli.options import place

METHODS = ("grid", "random", "bayes")
KEYS = (
    *("program", "method", "parameters", "command", "name", "description", "project", "entity", "metric", "run_cap"),
    *("early_terminate", "controller"),
)
PARAMETER_KEYS = ("value", "values", "probabilities", "distribution", "min", "max", "mu", "sigma", "q", "parameters")
DRAWN = ("uniform", "int_uniform", "q_uniform", "log_uniform_values", "q_log_uniform_values", "normal", "categorical")
ARGUMENTS = "${args}"
CONFIGS = ("--config", "-c")
NOTHING = ("${env}", "${interpreter}")
NAME_LENGTH = 80
Value = Any
Refuse = Callable[[str, str], ValueError]


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
    """

    name: str
    values: dict[str, Value] = field(hash=False)
    arguments: tuple[str, ...]


def read(path: Path, extra: tuple[str, ...] = ()) -> Sweep:
    """Read and check a sweep file.

    Args:
        path: of the file.
        extra: options of `dsmr fit` for all trials: config files come before the file's own options, all others
            after them; what a trial varies is last.

    Raises:
        ValueError: the file is missing, or a key or value in it is wrong; with file and line.
    """
    if not path.is_file():
        raise ValueError(f"sweep file {path}: no such file; experiments/*.yaml has some")
    content = yaml.safe_load(check_yaml(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no sweep file: it must have keys such as program, method and parameters")

    def refuse(key: str, message: str) -> ValueError:
        return ValueError(f"{key}{place(key, [path]) or f' ({path})'}: {message}")

    for key in content:
        if key not in KEYS:
            raise refuse(str(key), f"unknown key of a sweep{nearest(str(key), KEYS)}; known: {', '.join(KEYS)}")
    for key, example in {
        "program": "dsmr",
        "method": "grid",
        "parameters": "{seed_everything: {values: [0, 1]}}",
    }.items():
        if not content.get(key):
            raise ValueError(f"{path} has no {key}; add, for example, {key}: {example}")
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
    configs, others = parted(extra)
    return Sweep(path, name, {**content, "parameters": parameters}, (*configs, *options, *others))


def parted(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Config files, which set what a sweep file then changes, and all other options."""
    configs: list[str] = []
    others: list[str] = []
    for before, word in zip(["", *options], options, strict=False):
        is_config = word.partition("=")[0] in CONFIGS or before in CONFIGS
        (configs if is_config else others).append(word)
    return configs, others


def flattened(parameters: Mapping[str, Any], before: str, refuse: Refuse) -> Iterator[tuple[str, dict[str, Any]]]:
    """Parameters by dotted key, each checked."""
    for key, given in parameters.items():
        dotted = f"{before}{key}"
        if not isinstance(given, dict):
            raise refuse(str(key), f"must say which values it takes, for example {{value: {given}}}")
        unknown = [name for name in given if name not in PARAMETER_KEYS]
        if unknown:
            hint = nearest(str(unknown[0]), PARAMETER_KEYS)
            raise refuse(str(unknown[0]), f"unknown key of parameter {dotted}{hint}; {', '.join(PARAMETER_KEYS)}")
        ways = [name for name in ("value", "values", "parameters") if name in given]
        if not ways and given.keys() & {"min", "max", "mu", "sigma", "distribution"}:
            ways = ["distribution"]
        if len(ways) != 1:
            raise refuse(str(key), "give exactly one of value, values, min and max, or nested parameters")
        if ways == ["parameters"]:
            yield from flattened(given["parameters"], f"{dotted}.", refuse)
            continue
        values = given.get("values")
        if ways == ["values"] and (not isinstance(values, list) or not values):
            raise refuse(str(key), "values must be a list of at least one")
        chances = given.get("probabilities")
        if chances is not None and (len(chances) != len(values or []) or abs(sum(chances) - 1) > 1e-6):
            raise refuse(str(key), "probabilities must be one for each of values, and add up to 1")
        if ways == ["distribution"]:
            check_distribution(str(key), given, refuse)
        yield dotted, given


def check_distribution(key: str, given: Mapping[str, Any], refuse: Refuse) -> None:
    """Refuse what cannot be drawn from."""
    name = distribution(given)
    needed = ("mu", "sigma") if name == "normal" else ("min", "max")
    for part in needed if name != "normal" else ():
        if not isinstance(given.get(part), int | float):
            raise refuse(key, f"{name} needs {' and '.join(needed)}, as numbers")
    if name != "normal" and not given["min"] < given["max"]:
        raise refuse(key, f"min ({given['min']}) must be below max ({given['max']})")
    if name.endswith("log_uniform_values") and given["min"] <= 0:
        raise refuse(key, f"min ({given['min']}) of {name} must be above 0")


def distribution(given: Mapping[str, Any]) -> str:
    """Wandb's word for how a parameter is drawn."""
    if "distribution" in given:
        return str(given["distribution"])
    is_int = isinstance(given.get("min"), int) and isinstance(given.get("max"), int)
    return "normal" if "mu" in given else "int_uniform" if is_int else "uniform"


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
        seed: of random ones: the n-th trial does not depend on how many there are.

    Raises:
        ValueError: a method that needs wandb, or no number of random trials.
    """
    count = sweep.content.get("run_cap") if count is None else count
    if sweep.method == "bayes":
        raise ValueError(f"{sweep.path}: method bayes needs wandb, which decides; leave out --local, or use random")
    if sweep.method == "random":
        if count is None:
            raise ValueError(f"{sweep.path}: a random sweep has no end; give --trials N, or run_cap in the file")
        chosen = [
            {
                key: drawn(key, given, np.random.default_rng([seed, n, k]))
                for k, (key, given) in enumerate(sweep.parameters.items())
            }
            for n in range(count)
        ]
    else:
        for key, given in sweep.parameters.items():
            if "value" not in given and "values" not in given:
                raise ValueError(f"{key} ({sweep.path}): a grid needs values; {distribution(given)} is for random")
        lists = [given.get("values", [given.get("value")]) for given in sweep.parameters.values()]
        chosen = [dict(zip(sweep.parameters, values, strict=True)) for values in itertools.product(*lists)][:count]
    varied = [key for key, given in sweep.parameters.items() if "value" not in given]
    names = [name_of(sweep, values, varied) for values in chosen]
    made = []
    for n, (name, values) in enumerate(zip(names, chosen, strict=True)):
        own = f"{name}-{names[:n].count(name) + 1}" if names.count(name) > 1 else name
        arguments = [f"--{key}={spelt(value)}" for key, value in values.items()]
        made.append(Trial(own, values, (*locally(sweep.options), *arguments)))
    return made


def drawn(key: str, given: Mapping[str, Any], rng: np.random.Generator) -> Value:
    """A value of a parameter.

    Raises:
        ValueError: a distribution that only wandb draws from.
    """
    if "value" in given:
        return given["value"]
    if "values" in given:
        return given["values"][int(rng.choice(len(given["values"]), p=given.get("probabilities")))]
    name = distribution(given)
    if name == "normal":
        return legible(rng.normal(given.get("mu", 0.0), given.get("sigma", 1.0)))
    low, high, step = given["min"], given["max"], given.get("q", 1)
    if name == "int_uniform":
        return int(rng.integers(low, high + 1))
    if name in ("uniform", "q_uniform"):
        value = float(rng.uniform(low, high))
    elif name.endswith("log_uniform_values"):
        value = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    else:
        raise ValueError(f"{key}: distribution {name} needs wandb; here: {', '.join(DRAWN)}")
    if not name.startswith("q_"):
        return legible(value)
    rounded = step * round(value / step)
    return int(rounded) if isinstance(step, int) else rounded


def legible(value: float) -> float:
    """A drawn number to four digits, so that it can be read and typed."""
    return float(f"{value:.4g}")


def locally(options: tuple[str, ...]) -> list[str]:
    """Options without the logger of wandb: a trial that runs here logs to its own folder."""
    kept = list(options)
    while "wandb" in kept and kept[kept.index("wandb") - 1] in CONFIGS:
        at = kept.index("wandb")
        del kept[at - 1 : at + 1]
    return [option for option in kept if option not in ("--config=wandb", "-c=wandb")]


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
