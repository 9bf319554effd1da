"""Explain in one line why a setting is refused.

jsonargparse reports every alternative of a type that it has tried. Here the given settings are walked along the types
of the parser, down to the innermost part that jsonargparse refuses. Nothing depends on the wording of its messages.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args, get_origin

from jsonargparse import ArgumentParser

from dsmr.cli import nearest
from dsmr.cli.given_settings import (
    GivenSetting,
    Keys,
    NothingGiven,
    Option,
    all_given,
    merged_value,
    options_of,
    plain_default,
    setting_name,
    split_section,
)
from dsmr.cli.type_words import (
    classes_of,
    find_class,
    is_callable,
    is_class_name,
    is_sequence,
    known_classes,
    listing,
    path_of,
    shown_value,
    subclasses,
    type_words,
    with_article,
)
from dsmr.cli.yaml_values import WrittenFloat, WrittenParser, alternatives, is_mapping, is_unset, key_lines

CLOSE = 0.7
FILLED_BY_MODULE = ("vocab_size", "segment_length", "horizons")
"""Arguments of a network that `RecurrentLM` gives; horizons are set at `model.horizons` only."""
FORMER = {  # options of earlier versions, of older Lightning and of other programs
    "gpus": "trainer.accelerator and trainer.devices",
    "auto_lr_find": "model.optimizer.lr",
    "resume_from_checkpoint": "--resume RUN",
    "progress_bar_refresh_rate": "trainer.enable_progress_bar",
    "batch_size": "data.num_lanes",
    "lr": "model.optimizer.lr",
    "learning_rate": "model.optimizer.lr",
    "epochs": "trainer.max_epochs",
    "ablate": "dsmr analyze, which evaluates without the memory of each layer",
}


@dataclass(frozen=True)
class Refusal:
    """The reason why a setting is refused, as the message `{before}{name} ({file}, line 3){after}`."""

    keys: Keys
    after: str
    before: str = ""
    is_missing: bool = False  # true if a required argument is missing, which a later setting may still give


def explain(parser: ArgumentParser, arguments: list[str], message: str) -> str:
    """Explain an error of a parser in one line; by jsonargparse's own message if no single setting explains it."""
    found = list(refusals(parser, arguments))
    named = [sentence for key, sentence in found if key in message] + [sentence for _, sentence in found]
    if named:
        return named[0]
    rows = [line.strip() for line in message.splitlines() if line.strip()]
    reasons = [row[2:] for row in rows if row.startswith("- ")]
    return re.sub(r'Parser key "([\w.]+)":', r"\1:", " ".join([rows[0], reasons[0]] if reasons else rows))


def refusals(parser: ArgumentParser, arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the option and the explanation of every refused setting, in the order in which they are given."""
    options = options_of(parser)
    values: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for given in all_given(arguments, options):
        key = key_of(given.keys, options) or setting_name(given.keys)
        missing.pop(key, None)
        if (refusal := refused(options, values, given)) is None:
            continue
        before = refusal.before or ("--" if given.file is None and "." not in key else "")
        sentence = f"{before}{setting_name(refusal.keys)}{location(refusal, given)}{refusal.after}"
        if refusal.is_missing:
            missing[key] = sentence
        else:
            yield key, sentence
    yield from missing.items()


def key_of(keys: Keys, options: Mapping[str, Option]) -> str | None:
    """Return the name of the option that a path belongs to; None if there is none."""
    names = (setting_name(keys[:length]).removesuffix("+") for length in range(len(keys), 0, -1))
    return next((name for name in names if name in options), None)


def refused(options: Mapping[str, Option], values: dict[str, Any], given: GivenSetting) -> Refusal | None:
    """Add a setting to the values so far, and return the reason if it is refused."""
    keys = (*given.keys[:-1], str(given.keys[-1]).removesuffix("+"))
    is_appended = keys != given.keys
    key = key_of(keys, options)
    if given.value is NothingGiven and (key or keys == ("config",)):
        return Refusal(keys, " needs a value", before="--")
    if key is None:
        return unknown_option(keys, given.value, options)
    option, rest = options[key], keys[len(key.split(".")) :]
    if option.is_flag:
        is_right = isinstance(given.value, bool)
        return None if is_right else Refusal(keys, f" takes no value, not {shown_value(given.value)}")
    if rest and not any(classes_of(one) or is_mapping(one) for one in alternatives(option.kind)):
        return unknown_key(keys, f"; {key} is {type_words(option.kind)}, which has no keys of its own")
    before = values.get(key, plain_default(option.default))
    if is_appended:
        values[key] = [*(before if isinstance(before, list) else [] if before is None else [before]), given.value]
    else:
        values[key] = merged_value(before, rest, given.value)
    if not rest and is_unset(given.value, option.kind, option.default):
        return Refusal(keys, f" is null; it takes {type_words(option.kind)}")
    return why_not(tuple(key.split(".")), option.kind, values[key])


def unknown_option(keys: Keys, value: Any, options: Mapping[str, Option]) -> Refusal:
    """Explain an unknown key, or a section that is given a value."""
    key = setting_name(keys)
    inner = [name for name in options if name.startswith(f"{key}.")]
    if inner:
        return Refusal(keys, f" is {shown_value(value)}; it is a section of settings such as {inner[0]}")
    section, _, last = key.replace("-", "_").rpartition(".")
    same = [name for name in options if name.rpartition(".")[2] == last]
    if last in FORMER and not same:
        return unknown_key(keys, f"; use {FORMER[last]}")
    beside = [name.rpartition(".")[2] for name in options if name.rpartition(".")[0] == section]
    hint = nearest(last, beside, cutoff=CLOSE)
    if hint and section:
        hint = hint.replace("mean ", f"mean {section}.")
    elif same:
        hint = f"; did you mean {same[0]}?"
    return unknown_key(keys, hint or nearest(key, options, cutoff=CLOSE) or "; --help lists the known ones")


def unknown_key(keys: Keys, hint: str) -> Refusal:
    """Return the refusal of an unknown key."""
    return Refusal(keys, hint, before="unknown key ")


def why_not(keys: Keys, kind: Any, value: Any) -> Refusal | None:
    """Return the reason why a type refuses a value, or None if it accepts it."""
    if accepts(kind, value):
        return None
    for one in alternatives(kind):
        if (refusal := inside(keys, one, value, kind)) is not None:
            return refusal
    is_whole = isinstance(value, WrittenFloat) and value.is_integer() and int in alternatives(kind)
    hint = f": write {int(value)}" if is_whole else ""
    return Refusal(keys, f" is {shown_value(value)}; it takes {type_words(kind)}{hint}")


def accepts(kind: Any, value: Any) -> bool:
    """Return True if jsonargparse accepts a value for a type."""
    parser = WrittenParser(exit_on_error=False)
    if get_origin(kind) is Callable and get_args(kind)[0] is Ellipsis:  # a network

        def module(value): ...  # type: ignore[no-untyped-def]

        module.__annotations__ = {"value": kind}
        parser.add_function_arguments(module, skip={f"value.init_args.{name}" for name in FILLED_BY_MODULE})
    else:
        parser.add_argument("--value", type=kind)
    try:
        parser.parse_object({"value": value})
    except Exception:  # of any class: the value is refused
        return False
    return True


def inside(keys: Keys, one: Any, value: Any, whole: Any) -> Refusal | None:
    """Explain what is wrong within a value, for the alternative of its type that was meant."""
    inner = get_args(one)
    if isinstance(value, list) and is_sequence(one) and inner:
        found = (why_not((*keys, number), inner[0], item) for number, item in enumerate(value))
        return next((refusal for refusal in found if refusal is not None), None)
    bases = classes_of(one)
    if not bases:
        return None
    if isinstance(value, str) and is_class_name(value, whole):
        return wrong_class(keys, one, bases, {"class_path": value})
    if not isinstance(value, dict):
        return None
    if {"class_path", "init_args", "dict_kwargs"} & set(value):
        return wrong_class(keys, one, bases, value)
    if any(is_mapping(other) for other in alternatives(whole)):
        return None
    takes_any = not inspect.isabstract(bases[0]) and arguments_of(bases[0], None)
    return wrong_arguments(keys, bases[0], value, one) if takes_any else needs_class(keys, one)


def needs_class(keys: Keys, one: Any) -> Refusal:
    """Ask for a class whose arguments are given."""
    return Refusal(keys, f" needs a class_path, the name of its class{listing(known_classes(classes_of(one)))}")


def wrong_class(keys: Keys, one: Any, bases: tuple[type, ...], spec: Mapping[str, Any]) -> Refusal | None:
    """Return the reason why a class or its arguments are refused, or None."""
    path = spec.get("class_path")
    if not isinstance(path, str):
        return needs_class(keys, one)
    odd = sorted(set(map(str, spec)) - {"class_path", "init_args", "dict_kwargs"})
    if odd:
        after = " is beside class_path; arguments of the class belong under init_args"
        return Refusal((*keys, odd[0]), after, before="the key ")
    found, known = find_class(path, bases), known_classes(bases)
    if found is None or isinstance(found, str):
        close = nearest(path.rpartition(".")[2], known, cutoff=CLOSE) if found is None else ""
        return Refusal(keys, f": {found or f'no class {path}'}{close or ('' if found else listing(known))}")
    if inspect.isclass(found) and not issubclass(found, bases):
        twin = next((cls for base in bases for cls in subclasses(base) if cls.__name__ == found.__name__), None)
        hint = f"; did you mean {path_of(twin)}?" if twin else nearest(found.__name__, known, cutoff=CLOSE)
        return Refusal(keys, f": {path} is not {with_article(bases[0].__name__)}{hint}")
    if inspect.isabstract(found):
        return Refusal(keys, f": {path} is only a base of others{listing(known)}")
    return wrong_arguments(keys, found, spec.get("init_args") or {}, one)


def wrong_arguments(keys: Keys, cls: Any, arguments: Any, one: Any) -> Refusal | None:
    """Return the reason why the arguments of a class are refused, or None."""
    if not isinstance(arguments, dict):
        after = f" is {shown_value(arguments)}; it takes a mapping of {cls.__name__}'s keys"
        return Refusal((*keys, "init_args"), after)
    options = arguments_of(cls, one)
    values: dict[str, Any] = {}
    for key, value in arguments.items():
        for given in split_section(GivenSetting((str(key),), value, None), options):
            if given.keys[0] not in {name.partition(".")[0] for name in options}:
                hint = nearest(str(key), options) or ";"
                return unknown_key((*keys, str(key)), f"{hint} {cls.__name__} takes {', '.join(options) or 'none'}")
            if (refusal := refused(options, values, given)) is not None:
                return replace(refusal, keys=(*keys, *refusal.keys))
    missing = [name for name, option in options.items() if option.is_required and name not in values]
    if missing:
        needs = f": {cls.__name__} needs {' and '.join(missing)}; give {setting_name(keys)}.{missing[0]}"
        return Refusal(keys, needs, is_missing=True)
    return None


def arguments_of(cls: Any, one: Any) -> dict[str, Option]:
    """Return the arguments of a class or function, without those that its caller gives."""
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(cls) else parser.add_function_arguments
    inputs = get_args(one)[0] if is_callable(one) else []
    names = list(inspect.signature(cls).parameters)[: len(inputs)] if isinstance(inputs, list) else FILLED_BY_MODULE
    add(cls, fail_untyped=False, skip=set(names))
    return options_of(parser)


def location(refusal: Refusal, given: GivenSetting) -> str:
    """Return file and line of a setting, or of the nearest setting around it; empty for the command line."""
    if given.file is None:
        return ""

    def without_init_args(keys: Keys) -> Keys:  # which users may leave out
        return tuple(key for key in keys if key != "init_args")

    lines = key_lines(given.file.read_text(encoding="utf-8-sig"))
    known = {without_init_args(keys): line for keys, line in lines.items()}
    around = (without_init_args(refusal.keys[:length]) for length in range(len(refusal.keys), 0, -1))
    line = next((f", line {known[keys]}" for keys in around if keys in known), "")
    return f" ({given.file}{line})"
