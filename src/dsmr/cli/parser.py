"""The parser of every command: errors of one line, short help, and dashes or underscores in options."""

from collections.abc import Container
from types import NoneType
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, Namespace

from dsmr import UserError
from dsmr.cli.config_files import resolve_configs
from dsmr.cli.given_settings import option_value, options_of
from dsmr.cli.help_format import ShortHelp
from dsmr.cli.refusals import explain
from dsmr.cli.type_words import classes_of
from dsmr.cli.yaml_values import (
    MODE,
    Loader,
    WrittenParser,
    alternatives,
    current_path,
    dump_yaml,
    is_unset,
    load_yaml,
    plain_values,
)


class OneLineParser(WrittenParser):
    """A parser that raises `UserError` with one line instead of printing its usage.

    jsonargparse makes another parser of the same class for each class that a setting names; those raise
    jsonargparse's own errors, as it expects.
    """

    given_arguments: list[str] | None = None
    """Command line with underscores in all options and paths after `--config`; None in the parser of a class."""

    def __init__(self, prog: str | None = None, description: str = "", **kwargs: Any) -> None:
        defaults = {"allow_abbrev": False, "formatter_class": ShortHelp}
        super().__init__(prog=prog, description=description, **{**defaults, **kwargs, "parser_mode": MODE})

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse a command line."""
        if self.exit_on_error:
            options = underscored(list(args), keep=self._option_string_actions)
            # class paths of earlier versions, given alone or after `=`
            parts = [option.rpartition("=") for option in options]
            args = [name + equals + current_path(value) for name, equals, value in parts]
            if any(isinstance(action, ActionConfigFile) for action in self._actions):
                args = resolve_configs(args)
            self.given_arguments = args
        parsed: Namespace = plain_values(super().parse_args(args, *rest, **kwargs))
        if self.exit_on_error:
            for key, option in options_of(self).items():
                value = parsed.get(key, option.default)  # a linked setting has no value of its own
                if is_class_as_string(value, option.kind) or is_unset(value, option.kind, option.default):
                    self.error(f"{key} has no such value")
        return parsed

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """Parse the content of a config file, ignoring sections that hold only comments."""
        settings = load_yaml(content) if yaml.compose(content, Loader) else None
        if settings is None or isinstance(settings, dict):
            content = dump_yaml(without_empty_sections(settings or {}, self.groups or {}))
        return super().parse_string(content, *args, **kwargs)

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """Dump settings as YAML under a header that names the versions that wrote it."""
        header = "".join(f"# {line}\n" for line in self.dump_header or ())
        return header + super().dump(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `UserError` with the explanation of an error."""
        if self.given_arguments is None:
            super().error(message, ex)
        raise UserError(explain(self, self.given_arguments, message)) from ex


def without_empty_sections(settings: dict[Any, Any], groups: Container[str], above: str = "") -> dict[Any, Any]:
    """Remove sections that are null, since a section of comments alone is loaded as null."""
    kept = {}
    for key, value in settings.items():
        name = f"{above}{key}"
        if name in groups and isinstance(value, dict):
            value = without_empty_sections(value, groups, f"{name}.")
        elif name in groups and not isinstance(value, (str, NoneType)):
            raise TypeError(f"{name} is a section of settings")
        if name not in groups or value is not None:
            kept[key] = value
    return kept


FORMER_OPTIONS = {"--picture": "--plot"}


def underscored(arguments: list[str], keep: Container[str] = ()) -> list[str]:
    """Replace dashes in names of options by underscores, except in names to keep, and former names by present ones."""

    def spelt(name: str) -> str:
        name = "--" + name[2:].replace("-", "_") if name.startswith("--") and name not in keep else name
        return FORMER_OPTIONS.get(name, name)

    return [spelt(name) + equals + value for name, equals, value in (word.partition("=") for word in arguments)]


def is_class_as_string(value: Any, kind: Any) -> bool:
    """Return True if a class with wrong arguments was accepted as a string, because its type also takes strings."""
    if not isinstance(value, str) or not any(map(classes_of, alternatives(kind))):
        return False
    settings = option_value(value)
    return isinstance(settings, dict) and "class_path" in settings
