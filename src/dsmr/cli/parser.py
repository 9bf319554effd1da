"""Lightning's parser with mistakes of one line each."""

from lightning.pytorch.cli import LightningArgumentParser

from dsmr.cli.one_line import OneLineErrors


class OneLineParser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser; instead of a long usage dump, a mistake is a ValueError of one line."""
