"""Make a MidiTok tokenizer from a name and settings: find the class, and check which settings it reads.

A name without a dot is a class of MidiTok. `package.module.Class` is a user's own subclass of `miditok.MusicTokenizer`
that Python can import. This module imports neither torch nor Lightning.
"""

import difflib
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import miditok
from miditok import MusicTokenizer, TokenizerConfig

from dsmr import UserError
from dsmr.data.vocabulary import SPECIAL_TOKENS

REQUIRED_SETTINGS: dict[str, dict[str, Any]] = {
    "PerTok": {
        "ticks_per_quarter": 320,
        "use_microtiming": True,
        "max_microtiming_shift": 0.125,
        "num_microtiming_bins": 30,
    },
    "MMM": {"base_tokenizer": "REMI"},
}
"""Extra settings without which a class cannot be made, with example values."""
EXTRA_SETTINGS: dict[str, tuple[str, ...]] = {
    "PerTok": (*REQUIRED_SETTINGS["PerTok"], "use_position_toks"),
    "MMM": ("base_tokenizer", "density_bins_max"),
    "REMI": ("max_bar_embedding", "use_bar_end_tokens", "add_trailing_bars"),
    "MIDILike": ("max_duration",),
}
"""Settings that each class reads from `TokenizerConfig.additional_params`, as of MidiTok 3.1."""
ADDITIONAL = "additional_params"
CONFIG_OPTION = "data.tokenizer.config"


def make_tokenizer(name: str, settings: Mapping[str, Any]) -> MusicTokenizer:
    """Make a tokenizer from the name of its class and arguments of `TokenizerConfig`.

    Settings that only this class reads may be among them or in `additional_params`. Keys of `beat_res` are strings
    such as `"0_4"`. Raises `UserError` if the class or a setting cannot be used.
    """
    tokenizer_class = find_tokenizer_class(name)
    config, additional = split_settings(tokenizer_class, settings)
    try:
        for key in config.keys() & {"beat_res", "beat_res_rest"}:
            config[key] = {tuple(map(int, k.split("_"))): v for k, v in config[key].items()}
        if isinstance(config.get("time_signature_range"), dict):  # JSON keys are strings
            config["time_signature_range"] = {int(k): v for k, v in config["time_signature_range"].items()}
        defaults = {"use_pitchdrum_tokens": False, "special_tokens": list(SPECIAL_TOKENS)}
        tokenizer = tokenizer_class(TokenizerConfig(**defaults | config, **additional))
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, IndexError) as error:
        raise UserError(f"{CONFIG_OPTION}: {tokenizer_label(name)} refuses {dict(settings)}: {error!r}") from error
    if tokenizer.is_multi_voc:
        raise UserError(f"data.tokenizer.name: {name} writes several streams at once; dsmr models a single one")
    if [tokenizer.vocab.get(f"{token}_None") for token in SPECIAL_TOKENS] != list(range(len(SPECIAL_TOKENS))):
        raise UserError(f"data.tokenizer.name: the first tokens of {name} must be {', '.join(SPECIAL_TOKENS)}")
    return tokenizer


def find_tokenizer_class(name: str) -> type[MusicTokenizer]:
    """Return the tokenizer class of a name; raises `UserError` if it is unknown or cannot be imported."""
    module, _, attribute = name.rpartition(".")
    if not module:
        known = {c.__name__: c for c in vars(miditok).values() if is_tokenizer_class(c)}
        if name not in known:
            raise UserError(
                f"data.tokenizer.name: {name!r} is neither performance nor a MidiTok tokenizer"
                f"{_did_you_mean(name, known)}; known: {', '.join(known)}, or the dotted path of a class of your own"
            )
        return known[name]
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module may raise anything
        raise UserError(
            f"data.tokenizer.name: {name} cannot be imported ({error!r}); add the folder that holds "
            f"{module.partition('.')[0]} to PYTHONPATH, or install it"
        ) from error
    if not is_tokenizer_class(found):
        raise UserError(f"data.tokenizer.name: {name} is not a subclass of miditok.MusicTokenizer")
    return found


def tokenizer_source(name: str) -> str:
    """Return the source of the module of a user's own class; empty for MidiTok's classes and `performance`."""
    if "." not in name:
        return ""
    try:
        return inspect.getsource(importlib.import_module(name.rpartition(".")[0]))
    except (OSError, TypeError):  # a compiled module
        return ""


def split_settings(
    tokenizer_class: type[MusicTokenizer], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split settings into those of every tokenizer and those that only this class reads.

    Raises `UserError` if a setting is unknown or misspelt, or a required one is missing.
    """
    family = [c.__name__ for c in tokenizer_class.__mro__]
    additional = settings.get(ADDITIONAL) or {}
    if not isinstance(additional, Mapping):
        raise UserError(f"{CONFIG_OPTION}.{ADDITIONAL} is {additional!r}; it must be a mapping of names to values")
    families = [*family, additional.get("base_tokenizer", settings.get("base_tokenizer"))]
    extra = [key for one in families for key in EXTRA_SETTINGS.get(str(one), ())]
    parameters = inspect.signature(TokenizerConfig).parameters.values()
    general = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    check_additional(family[0], additional, general, extra)
    found: tuple[dict[str, Any], dict[str, Any]] = ({}, dict(additional))
    for key, value in settings.items():
        if key == ADDITIONAL:
            continue
        if key not in general and key not in extra:
            is_own = not tokenizer_class.__module__.startswith("miditok.")
            own = f"; what only your class reads goes into {ADDITIONAL}" if is_own else ""
            hint = _did_you_mean(key, [*general, *extra, ADDITIONAL]) or own
            raise UserError(f"{CONFIG_OPTION}: MidiTok has no setting {key!r} for {family[0]}{hint}")
        found[key in extra][key] = value
    if list(found[0].pop("special_tokens", SPECIAL_TOKENS)) != SPECIAL_TOKENS:
        raise UserError(f"{CONFIG_OPTION}.special_tokens are always {', '.join(SPECIAL_TOKENS)}; leave them out")
    check_required(family, found[1])
    return found


def check_additional(name: str, additional: Mapping[str, Any], general: list[str], extra: list[str]) -> None:
    """Raise `UserError` for a general or misspelt setting in `additional_params`, which MidiTok would ignore."""
    for key in additional:
        close = difflib.get_close_matches(key, [*extra, *general], n=1, cutoff=0.8)
        if key in general or (close and key not in extra):
            where = f"; give it in {CONFIG_OPTION} itself" if key in general else f"; did you mean {close[0]}?"
            raise UserError(f"{CONFIG_OPTION}.{ADDITIONAL}: {name} does not read {key!r} there{where}")


def check_required(family: Sequence[str], extra: Mapping[str, Any]) -> None:
    """Raise `UserError` with an example if a class lacks a setting that it requires."""
    for one in family:
        missing = [key for key in REQUIRED_SETTINGS.get(one, {}) if key not in extra]
        if extra.get("use_microtiming") is False and "num_microtiming_bins" in missing:
            missing.remove("num_microtiming_bins")
        if missing:
            example = json.dumps({key: REQUIRED_SETTINGS[one][key] for key in missing})
            raise UserError(f"{CONFIG_OPTION}: {one} needs {', '.join(missing)}; for example {example}")


def is_tokenizer_class(candidate: object) -> bool:
    """Return True for a subclass of `MusicTokenizer`."""
    return isinstance(candidate, type) and issubclass(candidate, MusicTokenizer) and candidate is not MusicTokenizer


def tokenizer_label(name: str) -> str:
    """Return the name of a tokenizer in messages."""
    return name if "." in name else f"MidiTok's {name}"


def _did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    spelt = {one.lower(): one for one in known}
    close = difflib.get_close_matches(word.lower(), list(spelt), n=1)
    return f"; did you mean {spelt[close[0]]}?" if close else ""
