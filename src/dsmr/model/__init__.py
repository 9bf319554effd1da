"""Networks and their memory: plain torch, no Lightning, no data.

`horizons` (how much each layer keeps) -> `memory` (where it is kept, and forgotten) -> `attention` (who sees
what) -> `backbone` (the interface) -> `transformer`.
"""

from dsmr.model.backbone import Backbone
from dsmr.model.horizons import Full, Schedule, TwoScale, Uniform, format_horizons, parse_horizons
from dsmr.model.memory import Memory, Update
from dsmr.model.transformer import RecurrentTransformer

__all__ = [
    "Backbone",
    "Full",
    "Memory",
    "RecurrentTransformer",
    "Schedule",
    "TwoScale",
    "Uniform",
    "Update",
    "format_horizons",
    "parse_horizons",
]
