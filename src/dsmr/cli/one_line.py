"""What our two parsers have in common: mistakes of one line, names that stay text, and sections that may be empty."""

from typing import Any, NoReturn

from jsonargparse import Namespace

from dsmr import UserError
from dsmr.cli.given import options_of, read
from dsmr.cli.kinds import classes_of
from dsmr.cli.reasons import explain
from dsmr.cli.scalars import MODE, WrittenParser, alternatives, dump, is_blank, is_unset, load, plain


class OneLineErrors(WrittenParser):
    """A parser whose mistakes are a ValueError of one line.

    jsonargparse makes another parser of the same class for each class that a setting names; these raise as it expects.
    """

    _arguments: list[str] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs, "parser_mode": MODE})

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse a command line.

        Raises:
            UserError: something of it is wrong.
        """
        if self.exit_on_error:
            self._arguments = list(args)
        parsed: Namespace = plain(super().parse_args(args, *rest, **kwargs))
        if self.exit_on_error:
            for key, option in options_of(self).items():
                value = parsed.get(key, option.default)  # what another setting gives has no value of its own
                if is_class_as_text(value, option.kind) or is_unset(value, option.kind, option.default):
                    self.error(f"{key} is no such value")
        return parsed

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """Parse the content of a config file; a section without anything but comments counts as not given."""
        return super().parse_string(self._without_empty_sections(content), *args, **kwargs)

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """Dump settings as YAML, with the header that says what wrote it."""
        header = "".join(f"# {line}\n" for line in self.dump_header or ())
        return header + super().dump(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the explanation of a mistake."""
        if self._arguments is None:
            super().error(message, ex)
        raise UserError(explain(self, self._arguments, message)) from ex

    def _without_empty_sections(self, content: str) -> str:
        if is_blank(content):
            return "{}"
        settings = load(content)
        if not isinstance(settings, dict):
            return content
        is_changed = False
        for name in sorted(self.groups or {}):
            *above, last = name.split(".")
            section: Any = settings
            for part in above:
                section = section.get(part)
                if not isinstance(section, dict):
                    break
            if not isinstance(section, dict) or last not in section:
                continue
            if section[last] is None:
                del section[last]
                is_changed = True
            elif not isinstance(section[last], (dict, str)):
                raise TypeError(f"{name} is a section of settings")
        return dump(settings) if is_changed else content


def is_class_as_text(value: Any, kind: Any) -> bool:
    """Whether a class with wrong arguments was taken for a text, since its type takes any text, too."""
    if not isinstance(value, str) or not any(map(classes_of, alternatives(kind))):
        return False
    settings = read(value)
    return isinstance(settings, dict) and "class_path" in settings
