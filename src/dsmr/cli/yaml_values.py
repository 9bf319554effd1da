"""YAML whose numbers remember how they were written, so that a run may be named `2024`, `1e3` or `1.10`.

jsonargparse loads a config file before it knows the types, and then refuses the integer 2024 for a string option.
Here a number is loaded together with its text, and the parser takes the text where a type accepts only strings.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace, set_dumper, set_loader

MODE = "dsmr"  # jsonargparse's name for the loader and dumper of this module
FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
"""YAML 1.1 needs a dot and a signed exponent; without this pattern, `3e-4` would be a string."""
FORMER_PATHS = {
    "dsmr.optim": "dsmr.training.optimizers",
    "dsmr.module": "dsmr.training.module",
    "dsmr.callbacks.Samples": "dsmr.generate.samples.Samples",
    "dsmr.callbacks.samples": "dsmr.generate.samples",
    "dsmr.callbacks": "dsmr.training.callbacks",
    "dsmr.checkpoint_io": "dsmr.training.checkpoint",
    "dsmr.metrics_csv": "dsmr.training.csv_logger",
}
"""Modules and classes of earlier versions, for old configs and run folders; the more specific ones first."""


def current_path(path: str) -> str:
    """Return where a class or module of an earlier version is now; any other string is returned unchanged."""
    for former, current in FORMER_PATHS.items():
        if path == former or path.startswith(f"{former}."):
            return current + path[len(former) :]
    return path


class _Number:
    """A number that remembers how it was written; copies and pickles do as well."""

    text: str
    real: Any

    def __new__(cls, value: float, text: str) -> Self:
        made = super().__new__(cls, value)  # type: ignore[call-arg]
        made.text = text
        return made

    def __getnewargs__(self) -> tuple[Any, str]:
        return self.real, self.text


class WrittenInt(_Number, int):  # type: ignore[misc]
    """An integer that remembers how it was written."""


class WrittenFloat(_Number, float):  # type: ignore[misc]
    """A float that remembers how it was written."""


class WrittenBool(str):
    """A YAML boolean that may be meant as a word: `yes`, `No`, `on`, `True`."""

    @property
    def value(self) -> bool:
        """The boolean that it is in YAML."""
        return self.lower() in ("yes", "true", "on")


Written = (WrittenInt, WrittenFloat, WrittenBool)


class Loader(yaml.SafeLoader):
    """A safe loader that keeps the text of numbers, leaves dates as strings and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse duplicate keys, of which YAML would silently keep the last."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """A dumper that quotes every string that `Loader` would not load as a string."""


def _represent(tag: str, dumper: Dumper, value: Any) -> yaml.ScalarNode:
    return dumper.represent_scalar(tag, str(getattr(value, "text", value)))


for _side in (Loader, Dumper):
    _side.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":timestamp", ":float"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _side.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
for _kind, _tag in ((WrittenInt, "int"), (WrittenFloat, "float"), (WrittenBool, "bool")):
    Dumper.add_representer(_kind, partial(_represent, f"tag:yaml.org,2002:{_tag}"))
for _tag, _constructor in {
    "int": lambda loader, node: WrittenInt(loader.construct_yaml_int(node), node.value),
    "float": lambda loader, node: WrittenFloat(loader.construct_yaml_float(node), node.value),
    "bool": lambda _, node: node.value == "true" if node.value in ("true", "false") else WrittenBool(node.value),
    "str": lambda loader, node: current_path(loader.construct_yaml_str(node)),
}.items():
    Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _constructor)


def load_yaml(text: str) -> Any:
    """Load a value; a string without any content for YAML, such as `#1`, is returned unchanged."""
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        return text if node is None else loader.construct_document(node)
    except (ValueError, TypeError) as error:  # such as a list as a key
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def dump_yaml(value: Any) -> str:
    """Dump settings as YAML, which `load_yaml` loads unchanged."""
    return str(yaml.dump(value, Dumper=Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False))


set_loader(MODE, load_yaml, (yaml.YAMLError,))
set_dumper(MODE, dump_yaml)


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union, flattened; a single type is its own alternative."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return tuple(one for part in get_args(kind) for one in alternatives(part))
    if origin is Annotated:
        return alternatives(get_args(kind)[0])
    return (NoneType if kind is None else kind,)


def as_written(value: Any, kind: Any) -> Any:
    """Replace a number or boolean by its text if a type accepts strings but no such value."""
    kinds = alternatives(kind)
    if isinstance(value, (bool, *Written)):
        text = str(value).lower() if isinstance(value, bool) else str(getattr(value, "text", value))
        value = value.value if isinstance(value, WrittenBool) else value
        same = (bool,) if isinstance(value, bool) else (int, float) if isinstance(value, int) else (float,)
        chosen = [item for one in kinds if get_origin(one) is Literal for item in get_args(one)]
        is_same = value in chosen or any(one in kinds for one in (*same, Any, object))
        return text if not is_same and (str in kinds or text in chosen) else value
    for one in kinds:
        inner = get_args(one)
        if isinstance(value, list) and inner and get_origin(one) is not Literal and not is_mapping(one):
            return [as_written(item, inner[0]) for item in value]
        if isinstance(value, dict) and len(inner) == 2 and is_mapping(one):
            return {key: as_written(item, inner[1]) for key, item in value.items()}
    return value


def is_mapping(one: Any) -> bool:
    """Return True for a mapping."""
    origin = get_origin(one) or one
    return isinstance(origin, type) and issubclass(origin, Mapping)


class WrittenParser(ArgumentParser):
    """A parser that gives string options the text as written, and refuses null for options that need a value."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse a command line."""
        action: Any
        for action in self._actions:
            if getattr(action, "_typehint", None) is not None:
                action._typehint = int_before_float(action._typehint)
        parsed: Namespace = super().parse_args(*args, **kwargs)
        return parsed

    def _check_value_key(self, action: Any, value: Any, key: str, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        """Check a value; jsonargparse calls this for all settings, also those of classes."""
        kind = getattr(action, "_typehint", None)
        if kind is not None:
            kind = action._typehint = int_before_float(kind)
            value = as_written(value, kind)
            if is_unset(value, kind, action.default):
                raise TypeError(f"{key} is null")
        return super()._check_value_key(action, value, key, cfg, *args, **kwargs)


def int_before_float(kind: Any) -> Any:
    """Return a union with int just before float, since jsonargparse tries its types in order.

    `Optional[int | float]` has float first if anything has made `Optional[float | int]` before: typing caches by
    equality. Lightning then reads `limit_val_batches: 1` as 1.0, the whole split.
    """
    kinds = get_args(kind)
    if get_origin(kind) not in (Union, UnionType) or not {int, float} <= set(kinds):
        return kind
    ordered = [one for one in kinds if one is not int]
    ordered.insert(ordered.index(float), int)
    return Union[tuple(ordered)]  # noqa: UP007


def is_unset(value: Any, kind: Any, default: Any) -> bool:
    """Return True for null where a value is needed."""
    return value is None and default is not None and not {NoneType, Any, object} & set(alternatives(kind))


def plain_values(value: Any) -> Any:
    """Replace numbers with text by plain numbers, in containers as well; namespaces are changed in place."""
    if isinstance(value, _Number):
        return value.real
    if isinstance(value, WrittenBool):
        return value.value
    if isinstance(value, Namespace):
        for key, item in vars(value).items():
            setattr(value, key, plain_values(item))
        return value
    if type(value) is dict:
        return {plain_values(key): plain_values(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain_values(item) for item in value)
    return value


def key_lines(text: str) -> dict[tuple[str | int, ...], int]:
    """Return the line of every key and list item in a YAML document, by its path."""
    node = yaml.compose(text, Loader)
    return {} if node is None else dict(_lines(node, ()))


def _lines(node: yaml.Node, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, str(key.value)), key.start_mark.line + 1
            yield from _lines(value, (*path, str(key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield (*path, number), item.start_mark.line + 1
            yield from _lines(item, (*path, number))
