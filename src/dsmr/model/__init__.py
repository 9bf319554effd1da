"""Networks and their memory: plain torch, no Lightning, no data.

`horizons` and `schedules` (how much each layer keeps) -> `memory` (where it is kept, and forgotten) ->
`view` (who sees what) -> `attention` (by which form; `merged`, `flex` and `fused` are the quick ones) ->
`backbone` (the interface) -> `decoder` (its layers) -> `transformer`, `perceiver`.
"""

from dsmr.model.backbone import Backbone
from dsmr.model.horizons import format_horizons, parse_horizons
from dsmr.model.memory import Memory, Update
from dsmr.model.perceiver import PerceiverAR
from dsmr.model.schedules import Ascending, Binary, Descending, Fitted, Full, Schedule, TwoScale, Uniform
from dsmr.model.transformer import RecurrentTransformer

__all__ = [
    "Ascending",
    "Backbone",
    "Binary",
    "Descending",
    "Fitted",
    "Full",
    "Memory",
    "PerceiverAR",
    "RecurrentTransformer",
    "Schedule",
    "TwoScale",
    "Uniform",
    "Update",
    "format_horizons",
    "parse_horizons",
]
