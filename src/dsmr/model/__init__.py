"""Networks and their memory: plain torch, no Lightning, no data.

Read in this order, as the paper reads:

`sizes` (settings of the layers) -> `horizons`, `schedules` (how much each layer keeps) -> `memory` (where it is kept
and forgotten) -> `rotary` (positions) -> `blocks` (the layers) -> `backbone` (the interface) -> `transformer`,
`perceiver`. Which keys a query may attend to is decided below, in `dsmr.attention.visibility`.
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
