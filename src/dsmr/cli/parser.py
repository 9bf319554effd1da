"""Lightning's parser with mistakes of one line each."""

from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from dsmr.cli.options import explain


class OneLineParser(LightningArgumentParser):
    """Lightning's parser; instead of a long usage dump, a mistake is a ValueError of one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.config_files: list[Path] = []

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # noqa: D102
        raise ValueError(explain(message, list(self.get_defaults().keys(branches=True)), self.config_files))
