"""The settings of a command line and its config files, in the order in which they are given."""

import argparse
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from dsmr.cli.yaml_values import load_yaml

Keys = tuple[str | int, ...]  # path of a setting; an integer is the index of a list item
COMMAND_LINE = math.inf  # level of the command line, above that of all config files


@dataclass(frozen=True)
class Option:
    """An option of a parser; a flag takes no value."""

    kind: Any
    default: Any
    is_required: bool
    is_flag: bool


@dataclass(frozen=True)
class GivenSetting:
    """One setting, with the config file that it is in; None for the command line."""

    keys: Keys
    value: Any
    file: Path | None


class NothingGiven:
    """Value of an option that needs a value and has none."""


def options_of(parser: ArgumentParser) -> dict[str, Option]:
    """Return the options of a parser by their names."""
    found = {}
    for action in parser._actions:
        kind = getattr(action, "_typehint", None) or action.type
        is_flag = action.nargs == 0 and bool(action.option_strings) and action.dest != argparse.SUPPRESS
        is_other = isinstance(action, ActionConfigFile | argparse._HelpAction)
        if (kind is not None or is_flag) and not is_other and not action.dest.endswith((".help", "print_config")):
            found[action.dest] = Option(kind, action.default, bool(action.required), is_flag)
    return found


def all_given(arguments: list[str], options: Mapping[str, Option]) -> Iterator[GivenSetting]:
    """Yield all settings of a command line and its config files."""
    rest = list(arguments)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        if not name.startswith("-"):
            continue
        key = "config" if name == "-c" else name.removeprefix("--")
        is_flag = key in options and options[key].is_flag
        if not equals and not is_flag and rest and not rest[0].startswith("--"):
            equals, text = "=", rest.pop(0)
        if key == "config" and equals:
            yield from file_settings(Path(text), options)
        elif equals or not is_flag:
            value = option_value(text) if equals else NothingGiven
            yield from split_section(GivenSetting(tuple(key.split(".")), value, None), options)


def option_value(text: str) -> Any:
    """Parse the value of an option."""
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text


def file_settings(path: Path, options: Mapping[str, Option]) -> Iterator[GivenSetting]:
    """Yield all settings of a config file."""
    if not path.is_file():
        return
    content = load_yaml(path.read_text(encoding="utf-8-sig"))
    if isinstance(content, dict):
        for key, value in content.items():
            yield from split_section(GivenSetting((str(key),), value, path), options)


def split_section(given: GivenSetting, options: Mapping[str, Option]) -> Iterator[GivenSetting]:
    """Yield the settings of a section one by one."""
    key = setting_name(given.keys)
    is_section = key not in options and any(name.startswith(f"{key}.") for name in options)
    if is_section and isinstance(given.value, dict):
        for name, value in given.value.items():
            yield from split_section(GivenSetting((*given.keys, str(name)), value, given.file), options)
    elif not (is_section and given.value is None):
        yield given


def merged_value(before: Any, rest: Keys, value: Any) -> Any:
    """Set a part of an option's value, keeping the rest of what it was before."""
    if not rest:
        return overlaid(before, value)
    if isinstance(before, list) and before:
        return [*before[:-1], merged_value(before[-1], rest, value)]
    if rest == ("class_path",):
        return {"class_path": value}
    known: dict[Any, Any] = before if isinstance(before, dict) else {}
    if isinstance(before, str) and all(part.isidentifier() for part in before.split(".")):
        known = {"class_path": before}
    if rest[0] in ("init_args", "dict_kwargs") and len(rest) == 1:
        return {**known, rest[0]: value}
    if not {"class_path", "init_args"} & set(known):
        return {**known, rest[0]: merged_value(known.get(rest[0]), rest[1:], value)}
    rest = rest[1:] if rest[0] == "init_args" else rest
    return {**known, "init_args": merged_value(known.get("init_args") or {}, rest, value)}


def overlaid(before: Any, value: Any) -> Any:
    """Return a value; if it only adds arguments to the class that was named before, with the others of that class."""
    if not (isinstance(before, dict) and isinstance(value, dict) and "class_path" in before and "init_args" in value):
        return value
    was, now = (str(one.get("class_path", before["class_path"])).rpartition(".")[2] for one in (before, value))
    if was != now:
        return value
    return {**before, **value, "init_args": {**(before.get("init_args") or {}), **(value["init_args"] or {})}}


def plain_default(default: Any) -> Any:
    """Return a default as a user would write it."""
    if isinstance(default, Namespace):
        return default.as_dict()
    if inspect.isclass(default):
        return {"class_path": f"{default.__module__}.{default.__qualname__}"}
    return default


def setting_name(keys: Keys) -> str:
    """Return the name of a setting as users type it, without `init_args` and indices."""
    return ".".join(str(key) for key in keys if key != "init_args" and isinstance(key, str))


def level_given(arguments: list[str], options: Mapping[str, Option], key: str) -> float:
    """Return the level at which a dotted key is set, to tell which of two settings wins.

    -1 is a default or base.yaml, 0 and above the position of a config file, `COMMAND_LINE` the command line. null does
    not count.
    """
    levels, files = [-1.0], list[Path]()
    for given in all_given(arguments, options):
        if given.file is not None and given.file not in files:
            files.append(given.file)
        values = [given]
        section = setting_name(given.keys)
        if isinstance(given.value, str) and key.startswith(f"{section}.") and Path(given.value).is_file():
            content = load_yaml(Path(given.value).read_text(encoding="utf-8-sig"))  # `--trainer trainer.yaml`
            values = list(split_section(replace(given, value=content), options))
        if any(setting_name(one.keys) == key and one.value not in (None, NothingGiven) for one in values):
            levels.append(COMMAND_LINE if given.file is None else files.index(given.file))
    return max(levels)
