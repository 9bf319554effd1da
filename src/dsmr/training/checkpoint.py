"""What a training run saves.

`last.ckpt` is Lightning's whole state with the stream's place and the training memory; `best.ckpt` holds the weights
and cannot resume.
"""

from typing import Any


def is_resumable(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint holds what training goes on from."""
    return "optimizer_states" in checkpoint
