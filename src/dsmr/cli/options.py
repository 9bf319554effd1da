"""Options of a command, with mistakes of one line each: the key, what is wrong with it, and the nearest right key."""

import re
from collections.abc import Iterable
from pathlib import Path

from jsonargparse import ArgumentParser

from dsmr.cli import nearest

_UNKNOWN = (
    re.compile(r"unrecognized arguments: -*(?P<key>[\w.]+)"),
    re.compile(r"Parser key \"(?P<parent>[\w.]+)\":.*Option '(?P<key>[\w.]+)' is not accepted", re.DOTALL),
    re.compile(r"[Oo]ption '(?P<key>[\w.]+)' is not accepted"),
    re.compile(r"does not accept option '(?P<key>[\w.]+)'"),
    re.compile(r"Key '(?P<key>[\w.]+)' is not expected"),
)


class OneLine(ArgumentParser):
    """A parser whose mistakes are a ValueError of one line; `--top-k` is `--top_k`."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]  # noqa: D102
        raise ValueError(explain(message, list(self.get_defaults().keys()), []))


def underscored(arguments: list[str]) -> list[str]:
    """Options with underscores, however they were spelt."""
    options = [argument.partition("=") for argument in arguments]
    return [
        "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else name + equals + value
        for name, equals, value in options
    ]


def explain(message: str, known: Iterable[str], config_files: Iterable[Path]) -> str:
    """One line of a message of jsonargparse; for a wrong key, its place and the nearest right key."""
    for pattern in _UNKNOWN:
        match = pattern.search(message)
        if match is None:
            continue
        parent = match.groupdict().get("parent")
        key = f"{parent}.{match['key']}" if parent else match["key"]
        short = [name.replace(".init_args.", ".") for name in known]
        hint = nearest(key, short) or "; --help lists the known ones"
        return f"unknown key {key}{place(key, config_files)}{hint}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reasons = [line[2:] for line in lines if line.startswith("- ")]
    if reasons:
        lines = [lines[0], reasons[0]]
    return re.sub(r"Parser key \"([\w.]+)\":", r"\1:", " ".join(lines))


def place(key: str, config_files: Iterable[Path]) -> str:
    """File and line of a key, where a config file has it."""
    pattern = re.compile(rf"(^|[{{,])\s*[\"']?{re.escape(key.rpartition('.')[2])}[\"']?\s*:")
    for path in config_files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if pattern.search(line):
                return f" ({path}, line {number})"
    return ""
