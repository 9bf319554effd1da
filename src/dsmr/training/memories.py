"""One memory for each split: training, validation and test never share one."""

from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from dsmr import UserError
from dsmr.model import Backbone
from dsmr.model.memory import Memory, map_lanes


class SplitMemories(dict[str, Memory]):
    """Memories by split, allocated at a split's first segment, when the compute precision is known."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        # training memory of a checkpoint, of the lanes of all processes, until training reads its first segment
        self.restored: dict[str, Any] | None = None

    def get_or_init(self, split: str, num_lanes: int, rank: int = 0, world_size: int = 1) -> Memory:
        """Return the memory of a split for `num_lanes` lanes of process `rank`; `UserError` if others were saved."""
        if split not in self:
            self[split] = self.backbone.init_memory(num_lanes)
            if split == "train" and self.restored is not None:
                saved = len(self.restored["length_B"])
                if saved != num_lanes * world_size:
                    raise UserError(f"the run has {saved} lanes, now there are {num_lanes * world_size}; use as many")
                lanes = slice(rank * num_lanes, (rank + 1) * num_lanes)
                self[split].load_state_dict(map_lanes(self.restored, lambda tensor: tensor[lanes]))
                self.restored = None
        return self[split]

    def training_tensors(self) -> list[Tensor]:
        """Return keys and values of the training memory, (B, K, M, D); none before the first segment."""
        return [*self["train"].keys, *self["train"].values] if "train" in self else []

    def training_state(self, trainer: Trainer) -> dict[str, Any] | None:
        """Return the training memory of all processes, by rank; None before the first segment of a fresh run."""
        if "train" not in self:  # resumed, and no segment read yet
            return self.restored
        state = self["train"].state_dict()
        if trainer.world_size == 1:
            return state

        def gathered(tensor: Tensor) -> Tensor:
            parts = [torch.empty_like(tensor) for _ in range(trainer.world_size)]
            torch.distributed.all_gather(parts, tensor.contiguous())
            return torch.cat([part.cpu() for part in parts])

        return map_lanes(state, gathered)
