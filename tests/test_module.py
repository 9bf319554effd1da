"""The LightningModule: memories per split, figures, the loss, checkpoints."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch.nn import functional as F  # noqa: N812

from dsmr import checkpoint as checkpoints
from dsmr.callbacks import LastCheckpoint
from dsmr.data.datamodule import MusicData
from dsmr.data.synthetic import RecallTask
from dsmr.metrics import TokenNLL
from dsmr.model import RecurrentTransformer
from dsmr.module import RecurrentLM
from dsmr.optim import AdamW, WarmupCosine


def backbone(vocab_size: int, horizons: Any, segment_length: int) -> RecurrentTransformer:
    return RecurrentTransformer(
        vocab_size,
        horizons,
        segment_length,
        d_model=16,
        num_layers=2,
        num_heads=2,
        memory_block=16,
        dropout=0.0,
    )


def recall_data(num_lanes: int = 4, **task: int) -> MusicData:
    sizes = {"num_train": 8, "num_validation": 5} | task
    return MusicData(recall=RecallTask(**sizes), segment_length=64, num_lanes=num_lanes, transpose=0)


def module(data: MusicData, **changes: Any) -> RecurrentLM:
    torch.manual_seed(0)
    return RecurrentLM("1x128+1x32", backbone, vocab_size=data.vocab_size, segment_length=64, **changes)


def trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": "cpu",
    }
    quiet |= {"enable_checkpointing": False, "num_sanity_val_steps": 0, "check_val_every_n_epoch": None}
    return Trainer(default_root_dir=folder, **{**quiet, "max_steps": 6, "val_check_interval": 3, **settings})


def figures(folder: Path, num_lanes: int, lm: RecurrentLM) -> dict[str, float]:
    (result,) = trainer(folder).validate(lm, recall_data(num_lanes), verbose=False)
    return dict(result)


def test_perplexity_does_not_depend_on_the_lanes_and_repeats_bitwise(tmp_path: Path) -> None:
    lm = module(recall_data())
    with torch.no_grad():
        lm.backbone.embedding.weight.mul_(30)
    first, again = (figures(tmp_path, 4, lm) for _ in range(2))
    assert first == again
    for num_lanes in (1, 2, 7):
        other = figures(tmp_path, num_lanes, lm)
        assert other == pytest.approx(first, rel=1e-5)
    assert first["val/tokens"] == sum(
        piece.length - 1 for piece in recall_data().store.pieces if piece.split == "validation"
    )


def test_the_figures_are_those_of_every_piece_alone(tmp_path: Path) -> None:
    data = recall_data()
    lm = module(data)
    logged = figures(tmp_path, 3, lm)
    nll, asked = 0.0, []
    for number in data.pieces("validation"):
        piece = data.store.pieces[number]
        ids = torch.from_numpy(data.store.tokens[piece.start : piece.start + piece.length].astype(np.int64))
        marks = torch.from_numpy(data.store.marks[piece.start : piece.start + piece.length].astype(np.int64))
        read = torch.where(marks > 0, 3, ids)[:-1]
        memory = lm.backbone.init_memory(1, decoding=True)
        for part, target, mark in zip(read.split(64), ids[1:].split(64), marks[1:].split(64), strict=True):
            with torch.no_grad():
                logits, update = lm.backbone(part[None], memory)
            memory.commit(update)
            each = F.cross_entropy(logits[0].double(), target, reduction="none")
            nll += float(each.sum())
            asked += each[mark > 0].tolist()
    pieces = [data.store.pieces[n] for n in data.pieces("validation")]
    assert logged["val/nll"] == pytest.approx(nll / logged["val/tokens"], rel=1e-6)
    assert logged["val/perplexity"] == pytest.approx(math.exp(logged["val/nll"]), rel=1e-6)
    assert logged["val/nats_per_note"] == pytest.approx(nll / sum(p.num_notes for p in pieces), rel=1e-6)
    assert logged["val/nats_per_second"] == pytest.approx(nll / sum(p.seconds for p in pieces), rel=1e-5)
    assert logged["val/recall/perplexity"] == pytest.approx(math.exp(np.mean(asked)), rel=1e-6)


def test_validation_leaves_the_training_memory_untouched(tmp_path: Path) -> None:
    seen = []

    class Watched(RecurrentLM):
        def on_validation_epoch_start(self) -> None:
            super().on_validation_epoch_start()
            self.before = copy.deepcopy(self._memories["train"].state_dict())

        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            torch.testing.assert_close(self._memories["train"].state_dict(), self.before, atol=0, rtol=0)
            assert self._memories["validation"].clock > 0
            seen.append(self._memories["train"].clock)

    data = recall_data()
    lm = Watched("1x128+1x32", backbone, vocab_size=data.vocab_size, segment_length=64)
    trainer(tmp_path).fit(lm, data)
    assert seen == [3 * 64, 6 * 64]


def test_the_loss_has_a_constant_denominator_and_a_weight_for_asked_tokens() -> None:
    data = recall_data()
    batch = next(b for b in data.train_dataloader() if (b.distance_BT > 0).any())
    lm = module(data, asked_weight=5.0)
    lm._trainer = None
    lm.log = lambda *_, **__: None  # type: ignore[method-assign]
    loss = lm.training_step(batch).detach()
    logits, _ = lm.backbone(batch.tokens_BT, lm.backbone.init_memory(4), batch.is_start_B)
    each = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="none").view_as(
        batch.targets_BT
    )
    weight = 1.0 + 4.0 * (batch.distance_BT > 0)
    assert loss.item() == pytest.approx(float((each.detach() * weight).sum() / (4 * 64)), rel=1e-6)


def test_memory_is_written_after_backward(tmp_path: Path) -> None:
    clocks = []

    class Watched(RecurrentLM):
        def on_before_backward(self, loss: torch.Tensor) -> None:
            clocks.append(self._memories["train"].clock)

        def on_after_backward(self) -> None:
            super().on_after_backward()
            clocks.append(self._memories["train"].clock)

    data = recall_data()
    lm = Watched("1x128+1x32", backbone, vocab_size=data.vocab_size, segment_length=64)
    trainer(tmp_path, max_steps=2).fit(lm, data)
    assert clocks == [0, 64, 64, 128]


def test_only_matrices_decay_and_the_rate_warms_up_and_falls(tmp_path: Path) -> None:
    data = recall_data()
    lm = module(data)
    lm.trainer = trainer(tmp_path, max_steps=3000)
    configured: Any = lm.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert isinstance(optimizer, AdamW)
    decays = {p.dim(): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(lm.parameters()))
    assert isinstance(scheduler, WarmupCosine)
    shares = [scheduler.share_at(step) for step in (0, 499, 999, 1000, 2000, 3000, 9000)]
    assert shares == pytest.approx([0.001, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1])


def test_a_cosine_without_an_end_is_refused(tmp_path: Path) -> None:
    lm = module(recall_data())
    lm.trainer = trainer(tmp_path, max_steps=-1, max_epochs=1)
    with pytest.raises(ValueError, match=r"trainer.max_steps"):
        lm.configure_optimizers()


def weights_after(folder: Path, lm: RecurrentLM, data: MusicData, steps: int, path: Path | None = None) -> dict:
    folder.mkdir(exist_ok=True)
    run = trainer(folder, max_steps=steps, callbacks=[LastCheckpoint(folder, 1000)])
    run.fit(lm, data, ckpt_path=path, weights_only=True)
    return copy.deepcopy(lm.backbone.state_dict())


def fixed_rate(groups: Any) -> AdamW:
    return AdamW(groups, lr=1e-2)


@pytest.mark.parametrize("stop", [7, 14, 28])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    """14 steps are an epoch: the stops lie inside one, at its end, and at the end of the second."""

    def fresh() -> tuple[RecurrentLM, MusicData]:
        data = MusicData(
            recall=RecallTask(distances=(64, 400), num_train=8, num_validation=1),
            segment_length=64, num_lanes=4, transpose=3,
        )  # fmt: skip
        schedule = lambda optimizer: WarmupCosine(optimizer, warmup_steps=3, total_steps=40)  # noqa: E731
        return module(data, optimizer=fixed_rate, lr_scheduler=schedule), data

    lm, data = fresh()
    assert len(data.train_dataloader()) == 14
    whole = weights_after(tmp_path / "whole", lm, data, 40)
    weights_after(tmp_path / "part", *fresh(), stop)
    resumed = weights_after(tmp_path / "part", *fresh(), 40, tmp_path / "part/last.ckpt")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_a_checkpoint_alone_rebuilds_network_and_tokenizer(tmp_path: Path) -> None:
    data = recall_data()
    lm = module(data)
    weights_after(tmp_path, lm, data, 3)
    loaded = checkpoints.load(tmp_path / "last.ckpt")
    assert loaded.backbone.horizons == (128, 32)
    assert loaded.tokenizer == {"name": "performance", "config": {}}
    assert all(torch.equal(v, loaded.backbone.state_dict()[k]) for k, v in lm.backbone.state_dict().items())
    assert checkpoints.read(tmp_path / "last.ckpt")["dsmr"]["rule"] == "boundary"


def test_a_checkpoint_of_weights_carries_no_memory_and_no_place(tmp_path: Path) -> None:
    data = recall_data()
    lm = module(data)
    run = trainer(tmp_path, max_steps=3)
    run.fit(lm, data)
    run.save_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    run.save_checkpoint(tmp_path / "last.ckpt")
    best, last = (checkpoints.read(tmp_path / name) for name in ("best.ckpt", "last.ckpt"))
    assert not checkpoints.is_resumable(best)
    assert "memory" not in best["dsmr"]
    assert "MusicData" not in best
    assert last["dsmr"]["memory"]["clock"] == 3 * 64
    assert last["MusicData"]["next_step"] == 3


def test_a_foreign_or_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such run"):
        checkpoints.find(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no best.ckpt"):
        checkpoints.find(tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="not written by dsmr"):
        checkpoints.load(tmp_path / "foreign.ckpt")
    torch.save({"x": Path("code")}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match="can be read safely"):
        checkpoints.load(tmp_path / "code.ckpt")


def test_token_nll_sums_before_it_divides() -> None:
    metric = TokenNLL()
    real = torch.tensor([[True, True, True, False]])
    metric.update(torch.tensor([[1.0, 2.0, 3.0, 0.0]]), real, real.clone(), torch.tensor([2.0]))
    metric.update(
        torch.tensor([[6.0, 0.0, 0.0, 0.0]]),
        torch.tensor([[True, False, False, False]]),
        ~real,
        torch.tensor([1.0]),
    )
    result = {name: float(value) for name, value in metric.compute().items()}
    assert result == pytest.approx(
        {"nll": 3.0, "perplexity": math.exp(3.0), "nats_per_note": 4.0, "nats_per_second": 4.0}
    )
    assert metric.nll.dtype == torch.float64
