"""Music from a trained network: `Generator` continues a piece of any length at constant memory.

    prompt -> generator (prefill, then one token per step: logits -> grammar's mask -> sampling) -> music (a score)

`continuations` generates several continuations of a given length; `audio` and `piano_roll` render them.
"""

from dsmr.generate.generator import Event, Generator, check_seed
from dsmr.generate.music import compose_score
from dsmr.generate.prompt import Prompt
from dsmr.generate.sampling import Sampling

__all__ = ["Event", "Generator", "Prompt", "Sampling", "check_seed", "compose_score"]
