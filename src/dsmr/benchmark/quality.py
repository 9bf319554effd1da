"""Perplexity of a row after a short training run; it says nothing about the end of training."""

from typing import Any

from lightning import Trainer, seed_everything

from dsmr.benchmark.settings import Workload
from dsmr.benchmark.variants import Row, build_network
from dsmr.data.datamodule import MusicData
from dsmr.training.module import RecurrentLM


def train_and_validate(
    work: Workload, row: Row, model: RecurrentLM, data: MusicData, limits: dict[str, Any]
) -> dict[str, Any]:
    """Train a row on `train_tokens` tokens; return the number of training tokens and the validation metrics.

    It may be any row but isolated windows, which need other data, and keeps the configured dropout. The model provides
    the optimizer and its schedule, and `limits` are the trainer's validation limits.
    """
    seed_everything(work.seed, verbose=False)
    per_step = data.num_lanes * data.segment_length
    steps = max(work.settings.train_tokens // per_step, 1)
    trained = RecurrentLM(
        row.horizons,  # type: ignore[arg-type]
        lambda **_: build_network(row, work.like, prefix_length=work.prefix_length),
        model.optimizer,
        model.lr_scheduler,
        model.asked_weight,
        vocab_size=work.vocab_size,
        segment_length=work.segment_length,
    )
    accelerator = "gpu" if work.device.type == "cuda" else "cpu"
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    common: dict[str, Any] = dict.fromkeys(off, False) | {"num_sanity_val_steps": 0}
    common |= {"accelerator": accelerator, "devices": 1, "precision": work.precision}
    Trainer(max_steps=steps, limit_val_batches=0, gradient_clip_val=1.0, **common).fit(trained, data)
    validation = Trainer(**limits, **common)
    validation.validate(trained, data, verbose=False)
    metrics = {name.removeprefix("val/"): float(value) for name, value in validation.callback_metrics.items()}
    wanted = ("perplexity", "nll", "nats_per_note", "nats_per_second")
    return {"trained_tokens": steps * per_step, **{name: metrics[name] for name in wanted if name in metrics}}
