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
    """Train the network of a row on `train_tokens` tokens and validate it.

    Args:
        work: sizes and settings; the network keeps the configured dropout.
        row: any row but isolated windows, which need other data.
        model: provides the optimizer and its schedule.
        data: training and validation pieces.
        limits: the trainer's validation limits.

    Returns:
        The number of training tokens, and the validation metrics.
    """
    seed_everything(work.seed, verbose=False)
    steps = max(work.settings.train_tokens // (data.num_lanes * data.segment_length), 1)
    trained = RecurrentLM(
        row.horizons,  # type: ignore[arg-type]
        lambda **_: build_network(row, work.like, prefix_length=work.prefix_length),
        model.optimizer,
        model.lr_scheduler,
        model.asked_weight,
        vocab_size=work.vocab_size,
        segment_length=work.segment_length,
    )
    common: dict[str, Any] = {
        "accelerator": "gpu" if work.device.type == "cuda" else "cpu",
        "devices": 1,
        "precision": work.precision,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    Trainer(max_steps=steps, limit_val_batches=0, gradient_clip_val=1.0, **common).fit(trained, data)
    validation = Trainer(**limits, **common)
    validation.validate(trained, data, verbose=False)
    metrics = {name.removeprefix("val/"): float(value) for name, value in validation.callback_metrics.items()}
    wanted = ("perplexity", "nll", "nats_per_note", "nats_per_second")
    tokens = steps * data.num_lanes * data.segment_length
    return {"trained_tokens": tokens, **{name: metrics[name] for name in wanted if name in metrics}}
