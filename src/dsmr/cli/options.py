"""Options of a command, with mistakes of one line each: the key, what is wrong with it, and the nearest right key."""

import re
from collections.abc import Iterable
from pathlib import Path

from dsmr.cli.one_line import OneLineErrors


class OneLine(OneLineErrors):
    """A parser whose mistakes are a ValueError of one line; `--top-k` is `--top_k`."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description)


def underscored(arguments: list[str]) -> list[str]:
    """Options with underscores, however they were spelt."""
    options = [argument.partition("=") for argument in arguments]
    return [
        "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else name + equals + value
        for name, equals, value in options
    ]


def place(key: str, config_files: Iterable[Path]) -> str:
    """File and line of a key, where a config file has it."""
    pattern = re.compile(rf"(^|[{{,])\s*[\"']?{re.escape(key.rpartition('.')[2])}[\"']?\s*:")
    for path in config_files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if pattern.search(line):
                return f" ({path}, line {number})"
    return ""
