"""Lightning's parser with mistakes of one line each."""

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from dsmr.cli.one_line import OneLineErrors


class OneLineParser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser; instead of a long usage dump, a mistake is a ValueError of one line."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Leave out the backbone's arguments that the module fills in: horizons are set at `--model.horizons` only."""
        filled = {f"backbone.init_args.{name}" for name in ("vocab_size", "segment_length", "horizons")}
        added: list[str] = super().add_class_arguments(*args, **kwargs | {"skip": {*kwargs.get("skip", ()), *filled}})
        return added
