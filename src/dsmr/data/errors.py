"""What can be wrong with somebody's data, as one line each."""

from dsmr import UserError


class Refused(Exception):  # noqa: N818 (a verdict on a file, not a failure)
    """A single file cannot be used; the message is the reason. Its neighbours are kept."""


class DataError(UserError):
    """The data as a whole cannot be used; the message says what to do."""
