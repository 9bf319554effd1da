"""The checkpoint with the best validation perplexity."""

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from dsmr.checkpoint import BEST


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt`, weights only; a run that was moved or copied still knows its best score.

    Args:
        folder: the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            dirpath=folder,
            filename=BEST.removesuffix(self.FILE_EXTENSION),
            monitor="val/perplexity",
            mode="min",
            save_weights_only=True,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, with the paths of the run's present folder."""
        assert self.dirpath is not None
        path = str(Path(self.dirpath) / BEST)
        moved: dict[str, Any] = {"dirpath": self.dirpath}
        if state_dict["best_model_path"]:
            moved |= {"best_model_path": path, "kth_best_model_path": path}
            moved["best_k_models"] = dict.fromkeys([path], state_dict["best_model_score"])
        super().load_state_dict(state_dict | moved)
