"""The checkpoint with the best validation perplexity, and its results by piece."""

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dsmr.results.piece_table import PIECES_FILE, PieceTable
from dsmr.results.run_files import BEST_FILE


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt`, weights only, and its `pieces.csv`; a run that was moved still knows its best score."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            dirpath=folder,
            filename=BEST_FILE.removesuffix(self.FILE_EXTENSION),
            monitor="val/perplexity",
            mode="min",
            save_weights_only=True,
            save_on_train_epoch_end=False,  # Lightning's choice for one validation an epoch would save after last.ckpt
            enable_version_counter=False,
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save weights and results by piece if they are the best so far."""
        before = self.best_model_score
        super().on_validation_end(trainer, pl_module)
        table = getattr(pl_module, "piece_table", None)
        if self.best_model_score is before or not (trainer.is_global_zero and isinstance(table, PieceTable)):
            return
        assert self.dirpath is not None
        path = Path(self.dirpath) / PIECES_FILE
        if table.is_complete(trainer.datamodule.store.pieces):  # type: ignore[attr-defined]
            table.write(path)
        else:  # results of earlier weights beside these would be worse than none
            path.unlink(missing_ok=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state, with the paths of the run's present folder."""
        assert self.dirpath is not None
        path = str(Path(self.dirpath) / BEST_FILE)
        moved: dict[str, Any] = {"dirpath": self.dirpath}
        if state_dict["best_model_path"]:
            best = {path: state_dict["best_model_score"]}
            moved |= {"best_model_path": path, "kth_best_model_path": path, "best_k_models": best}
        super().load_state_dict(state_dict | moved)
