"""Parameters of a sweep file: which values each takes, checked, and drawn where a sweep is random."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dsmr import UserError
from dsmr.cli import nearest

KEYS = ("value", "values", "probabilities", "distribution", "min", "max", "mu", "sigma", "q", "parameters")
RANGES = (
    *("uniform", "int_uniform", "q_uniform", "log_uniform", "q_log_uniform", "inv_log_uniform"),
    *("log_uniform_values", "q_log_uniform_values", "inv_log_uniform_values"),
)
NORMALS = ("normal", "q_normal", "log_normal", "q_log_normal")
DRAWN = ("uniform", "int_uniform", "q_uniform", "log_uniform_values", "q_log_uniform_values", "normal")
Value = Any
Refuse = Callable[[str, str], UserError]


def flattened(parameters: Mapping[str, Any], before: str, refuse: Refuse) -> Iterator[tuple[str, dict[str, Any]]]:
    """Parameters by dotted key, each checked."""
    for key, given in parameters.items():
        dotted = f"{before}{key}"
        if not isinstance(given, dict):
            raise refuse(str(key), f"must say which values it takes, for example {{value: {given}}}")
        unknown = [name for name in given if name not in KEYS]
        if unknown:
            hint = nearest(str(unknown[0]), KEYS)
            raise refuse(str(unknown[0]), f"unknown key of parameter {dotted}{hint}; {', '.join(KEYS)}")
        ways = [name for name in ("value", "values", "parameters") if name in given]
        if not ways and given.keys() & {"min", "max", "mu", "sigma", "distribution"}:
            ways = ["distribution"]
        if len(ways) != 1:
            raise refuse(str(key), "give exactly one of value, values, min and max, or nested parameters")
        if ways == ["parameters"]:
            nested = given["parameters"]
            if not isinstance(nested, dict) or not nested:
                raise refuse(str(key), "nested parameters must map keys to their values, such as {lr: {value: 0.001}}")
            yield from flattened(nested, f"{dotted}.", refuse)
            continue
        check_values(str(key), given, refuse)
        if ways == ["distribution"]:
            check_distribution(str(key), given, refuse)
        yield dotted, given


def check_values(key: str, given: Mapping[str, Any], refuse: Refuse) -> None:
    """Refuse values that are no list, and probabilities that are not theirs."""
    values, chances = given.get("values"), given.get("probabilities")
    if "values" in given and (not isinstance(values, list) or not values):
        raise refuse(key, "values must be a list of at least one")
    if chances is None:
        return
    is_one_each = isinstance(chances, list) and len(chances) == len(values or [])
    if not is_one_each or not all(is_number(p) and p >= 0 for p in chances) or abs(sum(chances) - 1) > 1e-6:
        raise refuse(key, "probabilities must be a list, one from 0 on for each of values, and add up to 1")


def check_distribution(key: str, given: Mapping[str, Any], refuse: Refuse) -> None:
    """Refuse what wandb cannot draw from."""
    name, known = distribution(given), (*RANGES, *NORMALS)
    if name not in known:
        hint = nearest(name, known)
        raise refuse(key, f"no distribution {name!r} without values{hint}; known: {', '.join(known)}")
    if "q" in given and not (is_number(given["q"]) and given["q"] > 0):
        raise refuse(key, f"q ({given['q']}) must be a number above 0")
    if name in NORMALS:
        mu, sigma = given.get("mu", 0), given.get("sigma", 1)
        if not is_number(mu) or not is_number(sigma) or sigma <= 0:
            raise refuse(key, f"mu ({mu}) of {name} must be a number, and sigma ({sigma}) a number above 0")
        return
    low, high = given.get("min"), given.get("max")
    if low is None or high is None or not is_number(low) or not is_number(high):
        raise refuse(key, f"{name} needs min and max, as numbers, such as 0.001 or 1.0e-3")
    if name == "int_uniform" and not (isinstance(low, int) and isinstance(high, int)):
        raise refuse(key, f"min ({low}) and max ({high}) of {name} must be whole numbers")
    if not low < high:
        raise refuse(key, f"min ({low}) must be below max ({high})")
    if name.endswith("log_uniform_values") and low <= 0:
        raise refuse(key, f"min ({low}) of {name} must be above 0")


def is_number(given: Any) -> bool:
    """Whether YAML gave a number, which `1e-3` is not: it takes `1.0e-3`."""
    return isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)


def distribution(given: Mapping[str, Any]) -> str:
    """Wandb's word for how a parameter is drawn."""
    if "distribution" in given:
        return str(given["distribution"])
    is_int = isinstance(given.get("min"), int) and isinstance(given.get("max"), int)
    return "normal" if given.keys() & {"mu", "sigma"} else "int_uniform" if is_int else "uniform"


def is_listed(given: Mapping[str, Any]) -> bool:
    """Whether the values of a parameter are counted, not drawn from a distribution."""
    return "value" in given or "values" in given


def drawn(given: Mapping[str, Any], rng: np.random.Generator) -> Value:
    """A value of a parameter that is listed, or whose distribution is one of `DRAWN`."""
    if "value" in given:
        return given["value"]
    if "values" in given:
        chances = given.get("probabilities")
        shares = None if chances is None else np.array(chances) / sum(chances)  # numpy takes no rounded sum
        return given["values"][int(rng.choice(len(given["values"]), p=shares))]
    name = distribution(given)
    assert name in DRAWN
    if name == "normal":
        return legible(rng.normal(given.get("mu", 0.0), given.get("sigma", 1.0)))
    low, high, step = given["min"], given["max"], given.get("q", 1)
    if name == "int_uniform":
        return int(rng.integers(low, high + 1))
    if name.endswith("log_uniform_values"):
        value = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    else:
        value = float(rng.uniform(low, high))
    if not name.startswith("q_"):
        return legible(value)
    rounded = step * round(value / step)
    return int(rounded) if isinstance(step, int) else rounded


def legible(value: float) -> float:
    """A drawn number to four digits, so that it can be read and typed."""
    return float(f"{value:.4g}")
