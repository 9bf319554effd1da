"""Describe the types of settings in words, and find the classes that settings name."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from enum import Enum
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from dsmr.cli.yaml_values import Written, alternatives, is_mapping, plain_values

MOST_SHOWN, MOST_KNOWN = 60, 12
WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a mapping",
    timedelta: "a duration such as 0:02:00",
}


def type_words(kind: Any) -> str:
    """Describe the values of a type: `an integer`, `'norm' or 'value'`, `a Callback, a list of such or null`."""
    kinds = [one for one in alternatives(kind) if one is not int or float not in alternatives(kind)]
    singles = [part for one in kinds if not is_sequence(one) and one is not NoneType for part in _words(one)]
    lists = [_list_words(get_args(one), singles) for one in kinds if is_sequence(one)]
    # 16 and "16" are mentioned once
    unique = {part.strip("'") if part.strip("'").isdigit() else part: None for part in [*singles, *lists]}
    *first, last = [*unique, *(["null"] if NoneType in kinds else [])]
    return f"{', '.join(first)} or {last}" if first else last


def _words(one: Any) -> list[str]:
    """Describe a type that is neither a union nor a list."""
    if choices(one):
        return [repr(item) for item in choices(one)]
    classes = [with_article(cls.__name__) for cls in classes_of(one)]
    other = WORDS[dict] if is_mapping(one) else str(getattr(one, "__name__", one))
    return classes or [WORDS.get(one, other)]


def _list_words(items: tuple[Any, ...], singles: list[str]) -> str:
    """Describe a list by the types of its items; `of such` if a single item is accepted as well."""
    if not items:
        return WORDS[list]
    if len(items) > 1 and items[1] is not Ellipsis:
        return f"a list of {len(items)} ({', '.join(map(type_words, items))})"
    inner = type_words(items[0])
    return "a list of such" if inner in singles else f"a list (each item {inner})"


def with_article(noun: str) -> str:
    """Return a noun or an abbreviation with its indefinite article."""
    vowels = "AEFHILMNORSX" if noun[:2].isupper() else "AEIO"  # abbreviations are spelt
    return f"{'an' if noun[0] in vowels else 'a'} {noun}"


def shown_value(value: Any) -> str:
    """Format a value for a message, as the user wrote it."""
    if isinstance(value, Written):
        return str(getattr(value, "text", value))
    if isinstance(value, str):
        return repr(value if len(value) <= MOST_SHOWN else value[: MOST_SHOWN - 3] + "...")
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(plain_values(value))
    return text if len(text) <= MOST_SHOWN else "a list" if isinstance(value, list) else "a mapping"


def choices(one: Any) -> list[Any]:
    """Return the values of a Literal or an Enum; empty for other types."""
    if get_origin(one) is Literal:
        return list(get_args(one))
    return list(one.__members__) if inspect.isclass(one) and issubclass(one, Enum) else []


def classes_of(one: Any) -> tuple[type, ...]:
    """Return the classes that a type accepts, or that its callable returns; empty for plain values."""
    if is_callable(one):
        return tuple(cls for result in alternatives(get_args(one)[-1]) for cls in classes_of(result))
    is_plain = not inspect.isclass(one) or get_origin(one) is not None or issubclass(one, (Enum, Path))
    return () if is_plain or one.__module__ in ("builtins", "datetime", "os", "typing", "decimal", "uuid") else (one,)


def is_callable(one: Any) -> bool:
    """Return True for a callable with a known result, which settings name by its class."""
    return get_origin(one) is Callable and bool(get_args(one))


def is_sequence(one: Any) -> bool:
    """Return True for a list or another sequence of Python's own."""
    origin = get_origin(one) or one
    is_own = inspect.isclass(origin) and origin.__module__ in ("builtins", "collections", "collections.abc")
    return is_own and issubclass(origin, Iterable) and not issubclass(origin, (str, bytes, Mapping))


def is_class_name(value: str, whole: Any) -> bool:
    """Return True if a string is meant as a class name: it looks like one, or no other string is accepted."""
    takes_text = any(one is str or choices(one) for one in alternatives(whole))
    looks = re.fullmatch(r"(\w+\.)*[A-Z]\w*", value) is not None
    return looks or (not takes_text and re.fullmatch(r"[A-Za-z_][\w.]*", value) is not None)


def find_class(path: str, bases: Iterable[type]) -> Any:
    """Return a class by its path, or by its name among subclasses; None or the reason if there is none."""
    if "." not in path:
        found = {path_of(cls): cls for base in bases for cls in subclasses(base) if cls.__name__ == path}
        if len(found) > 1:
            return f"{path} is ambiguous; write {' or '.join(found)}"
        return next(iter(found.values()), None)
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None) or f"module {module} has no {name}"
    except ModuleNotFoundError as error:
        return f"no module {error.name}" if module.startswith(str(error.name)) else f"{module} needs {error.name}"
    except Exception as error:  # whatever a user's module raises
        return f"{module} cannot be imported ({error})"


def path_of(cls: type) -> str:
    """Return the shortest path from which a class can be imported."""
    parts = cls.__module__.split(".")
    modules = (".".join(parts[:length]) for length in range(1, len(parts)))
    short = (module for module in modules if getattr(sys.modules.get(module), cls.__name__, None) is cls)
    return f"{next(short, cls.__module__)}.{cls.__name__}"


def subclasses(base: type) -> list[type]:
    """Return a class and all classes that derive from it."""
    return [base, *chain.from_iterable(map(subclasses, base.__subclasses__()))]


def known_classes(bases: tuple[type, ...]) -> list[str]:
    """Return the names of all classes that can be instantiated."""
    return sorted({cls.__name__ for base in bases for cls in subclasses(base) if not inspect.isabstract(cls)})


def listing(known: list[str]) -> str:
    """Return `; known: ...`, or an empty string for a list that is too long."""
    return f"; known: {', '.join(known)}" if 0 < len(known) <= MOST_KNOWN else ""
