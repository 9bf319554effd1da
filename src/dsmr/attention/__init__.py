"""Attention over memory and segment: tensors and a visibility in, tensors out. Nothing here knows of networks.

`visibility` (which keys each query may attend to, one number per query) -> `attend` (the function, and the registry of
its implementations) -> `reference` (plain, which all others must equal), `merged` and `fused` (CPU training), `flex`
(CUDA), `decode` and its kernel (one token at a time).
"""

from dsmr.attention.backends import Backend, attend
from dsmr.attention.visibility import RULES, Past, Visibility

__all__ = ["RULES", "Backend", "Past", "Visibility", "attend"]
