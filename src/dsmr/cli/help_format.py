"""Short help: one entry per option with its type in words and its default, without the lists of every subclass."""

import re
from argparse import SUPPRESS, Action
from collections.abc import Iterable
from types import NoneType
from typing import Any, Union

from jsonargparse import DefaultHelpFormatter, Namespace

from dsmr.cli.type_words import MOST_KNOWN, alternatives, classes_of, known_classes, type_words

OWN_WORDS = {
    "help": "Print this help and exit.",
    "seed_everything": "Random seed, or true for a random one (default: 0).",
    "print_config": "Print the complete configuration and exit.",
    "config": "Configuration file, or the name of a shipped one such as laptop; repeatable, later ones win.",
}


class ShortHelp(DefaultHelpFormatter):
    """A formatter of help; `--KEY.help CLASS` still prints the options of a class, without an entry of its own."""

    hidden: re.Pattern[str] = re.compile(r"(?!)")  # matches options that are left out

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"max_help_position": 32, "width": 110, **kwargs})

    def add_text(self, text: str | None) -> None:
        """Add a paragraph to the help, but skip jsonargparse's note on the path of base.yaml."""
        if getattr(self._current_section, "heading", None) != "default config file locations":
            super().add_text(text)

    def add_argument(self, action: Action) -> None:
        """Add an option, unless it only prints the help of a class or loads a section from a file."""
        is_other = type(action).__name__ in ("_ActionConfigLoad", "ActionLink") or action.dest.endswith(".help")
        if not is_other and not self.hidden.match(action.dest):
            super().add_argument(action)

    def _format_usage(self, usage: str | None, actions: Iterable[Action], groups: Any, prefix: str | None) -> str:
        positionals = [action.dest.upper() for action in actions if not action.option_strings]
        return " ".join([prefix or "usage:", self._prog, *positionals, "[options]"]) + "\n\n"

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings:
            return action.dest.upper()
        spellings = {option.replace("-", "_").rstrip("+"): option for option in reversed(action.option_strings)}
        return ", ".join(reversed(spellings.values()))

    def _get_help_string(self, action: Action) -> str:
        text = OWN_WORDS.get(action.dest) or action.help or ""
        kind = getattr(action, "_typehint", None) or action.type
        is_expanded = getattr(action, "_jsonargparse_preexpanded_help", False)  # jsonargparse calls this twice
        if kind is None or action.dest in OWN_WORDS or not action.option_strings or is_expanded:
            return text
        kinds = alternatives(kind)
        if action.default is None:  # the default is clear from the text
            kinds = tuple(one for one in kinds if one is not NoneType)
        about = [type_words(Union[kinds])]  # noqa: UP007 (a tuple)
        known = known_classes(tuple(cls for one in kinds for cls in classes_of(one)))
        if 1 < len(known) <= MOST_KNOWN:
            about.append(f"known: {', '.join(known)}")
        if action.required:
            about.append("required")
        elif action.default not in (None, SUPPRESS):
            default = action.default.as_dict() if isinstance(action.default, Namespace) else action.default
            if isinstance(default, dict) and "class_path" in default:
                default = str(default["class_path"]).rpartition(".")[2]
            words = {"None": "null", "True": "true", "False": "false"}
            about.append(f"default: {words.get(str(default), str(default))}")
        return f"{text} ({'; '.join(about)})".strip()


class FitHelp(ShortHelp):
    """Help without the options of Lightning's Trainer."""

    hidden = re.compile(r"trainer\b")


class RunHelp(ShortHelp):
    """Help without the options of training, which other commands only read from a run's config."""

    hidden = re.compile(r"trainer\b|(name|root|resume|save_every_n_steps|save_every_minutes|sample_every_n_steps)$")
