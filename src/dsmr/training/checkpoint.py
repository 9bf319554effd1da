"""Content of checkpoints: everything that a run saves, and that a resumed run restores.

`last.ckpt` holds everything in `RESTORED`; `best.ckpt` holds only the weights and the description of the network, and
cannot resume. `dsmr.results.run_files` reads a file, `dsmr.share.description` describes its network.
"""

import io
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from dsmr import UserError
from dsmr.data.files import atomic_write
from dsmr.results.run_files import SECTION

RESTORED = {
    "state_dict": "weights of the network",
    "optimizer_states": "optimizer state: moments, momenta, step counts, and the settings of its parameter groups",
    "lr_schedulers": "learning-rate schedule: the step that it has reached; its shape comes from the configuration",
    "loops": "Lightning's counters: epochs, batches, optimizer steps, and a validation that was cut off",
    "callbacks": "best score and its file (BestCheckpoint); rows of metrics.csv that are kept, and progress of the "
    "validation (LastCheckpoint); whatever other callbacks save",
    "MusicData": "position in the training stream (epoch and step), and the settings that must not change",
    f"{SECTION}.memory": "training memory: keys, values, lengths and clock of the lanes of all processes",
    f"{SECTION}.random": "RNG state of each process, on the CPU and on its GPU (dropout)",
    "MixedPrecision": "scale of the gradient scaler, with precision 16-mixed only",
}
"""Everything that a resumed run restores, by its place in `last.ckpt`; `SECTION.key` is a key of the section `dsmr`.

Lightning's Trainer restores the first four, and calls `load_state_dict` of callbacks and `MusicData`. `RecurrentLM`
restores the RNG state when training starts, and the memory with its first segment (`SplitMemories`). Outside the
checkpoint, `config.yaml` has all settings and the W&B id, and `metrics.csv` is cut to the rows that it knows.
The order of pieces and their transposition are not stored: they follow from seed and epoch.
"""

CHECKED = {
    "epoch": "Lightning's copy of a counter in `loops`",
    "global_step": "optimizer steps; for messages, and for the rows of metrics.csv in format 1",
    "pytorch-lightning_version": "for Lightning's own migrations",
    SECTION: "description of network, tokenizer and data: must fit the configuration, see `check_same_network`",
}
"""Other keys of `last.ckpt`: read, but nothing is restored from them."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint completely or not at all; the old file stays until the new one is on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write to a hidden file in the same folder, then rename; raises `UserError` if the disk is full."""
        path = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(content.getbuffer())
        except OSError as error:
            kept = "; the previous one is intact" if path.exists() else ""
            raise UserError(
                f"cannot write {path} ({error.strerror or error}){kept}: make room, then resume with "
                f"dsmr fit --resume {path.parent}"
            ) from error


def is_resumable(checkpoint: dict[str, Any]) -> bool:
    """Return True if training can resume from a checkpoint."""
    return "optimizer_states" in checkpoint


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's generators on the CPU and on `device`; on CUDA this does not wait for the GPU."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Set torch's generators to a saved state."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def gather_random_states(state: dict[str, Tensor], trainer: Trainer) -> list[dict[str, Tensor]]:
    """Return the states of all processes, in the order of their ranks."""
    states = [state] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(states, state)
    return states
