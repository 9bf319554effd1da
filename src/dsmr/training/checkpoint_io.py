"""How a training run writes its checkpoints: as a whole or not at all."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from dsmr import UserError
from dsmr.data.files import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint as a whole or not at all, and on the disk; the old one stays until then."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside the file, then rename.

        Raises:
            UserError: there is no room, or no right to write.
        """
        path = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(content.getbuffer())
        except OSError as error:
            kept = "; the one before it is whole" if path.exists() else ""
            raise UserError(
                f"cannot write {path} ({error.strerror or error}){kept}: make room, then go on with "
                f"dsmr fit --resume {path.parent}"
            ) from error
