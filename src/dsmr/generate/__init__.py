"""Music from a trained network: `Generator` continues a piece, as long as one likes, at constant memory."""

from dsmr.generate.generator import Event, Generator, check_seed
from dsmr.generate.music import compose
from dsmr.generate.prompt import Prompt
from dsmr.generate.sampling import Sampling

__all__ = ["Event", "Generator", "Prompt", "Sampling", "check_seed", "compose"]
