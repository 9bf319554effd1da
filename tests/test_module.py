"""The LightningModule: memories per split, metrics, the training step, checkpoints."""

import copy
import math
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.nn import functional as F  # noqa: N812

from conftest import tiny_transformer
from dsmr import UserError
from dsmr.data.datamodule import MusicData
from dsmr.data.synthetic import RecallTask
from dsmr.data.windows import Windows
from dsmr.model import RecurrentTransformer, parse_horizons
from dsmr.results.run_files import read_checkpoint
from dsmr.share.description import check_same_network, describe_network
from dsmr.share.loading import find_checkpoint, load_model
from dsmr.training.callbacks import BestCheckpoint, LastCheckpoint
from dsmr.training.checkpoint import CHECKED, RESTORED, is_resumable
from dsmr.training.losses import NotFiniteError, token_nll
from dsmr.training.memories import SplitMemories
from dsmr.training.metrics import TokenNLL
from dsmr.training.module import RecurrentLM
from dsmr.training.optimizers import AdamW, Muon, WarmupCosine
from dsmr.training.step import HostFlag, TrainingStep
from test_memory import boundary_mask, one_pass, stream


def backbone(vocab_size: int, horizons: Any, segment_length: int, dropout: float = 0.0) -> RecurrentTransformer:
    sizes: dict[str, Any] = {"d_model": 16, "num_layers": 2, "num_heads": 2, "memory_block": 16}
    return RecurrentTransformer(vocab_size, horizons, segment_length, dropout=dropout, **sizes)


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


def validation_metrics(folder: Path, num_lanes: int, lm: RecurrentLM) -> dict[str, float]:
    (result,) = trainer(folder).validate(lm, recall_data(num_lanes), verbose=False)
    return dict(result)


def test_perplexity_does_not_depend_on_the_lanes_and_repeats_bitwise(tmp_path: Path) -> None:
    lm = module(recall_data())
    with torch.no_grad():
        lm.backbone.embedding.weight.mul_(30)
    first, again = (validation_metrics(tmp_path, 4, lm) for _ in range(2))
    assert first == again
    for num_lanes in (1, 2, 7):
        other = validation_metrics(tmp_path, num_lanes, lm)
        assert other == pytest.approx(first, rel=1e-5)
    assert first["val/tokens"] == sum(
        piece.length - 1 for piece in recall_data().store.pieces if piece.split == "validation"
    )


def test_metrics_equal_those_of_every_piece_alone(tmp_path: Path) -> None:
    data = recall_data()
    lm = module(data)
    logged = validation_metrics(tmp_path, 3, lm)
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


def test_windows_are_scored_with_their_context_and_without_memory(tmp_path: Path) -> None:
    data = MusicData(
        recall=RecallTask(num_train=8, num_validation=3), segment_length=64, num_lanes=4, windows=Windows(16)
    )
    lm = RecurrentLM("2x0", backbone, vocab_size=data.vocab_size, segment_length=64)
    (logged,) = trainer(tmp_path).validate(lm, data, verbose=False)
    nll = []
    for number in data.pieces("validation"):
        piece = data.store.pieces[number]
        ids = torch.from_numpy(data.store.tokens[piece.start : piece.start + piece.length].astype(np.int64))
        marks = torch.from_numpy(data.store.marks[piece.start : piece.start + piece.length].astype(np.int64))
        read = torch.where(marks > 0, 3, ids)[:-1]
        for scored in [0, *range(64, len(read), 16)]:
            end = min(len(read), scored + (16 if scored else 64))
            first = max(0, end - 64) if scored else 0
            with torch.no_grad():
                logits, _ = lm.backbone(read[None, first:end], lm.backbone.init_memory(1, decoding=True))
            nll += F.cross_entropy(
                logits[0, scored - first :].double(), ids[scored + 1 : end + 1], reduction="none"
            ).tolist()
    assert logged["val/tokens"] == len(nll) == sum(data.store.pieces[n].length - 1 for n in data.pieces("validation"))
    assert logged["val/nll"] == pytest.approx(np.mean(nll), rel=1e-6)


def test_windows_refuse_a_memory_that_they_would_never_read(tmp_path: Path) -> None:
    data = MusicData(recall=RecallTask(num_train=8, num_validation=3), segment_length=64, windows=Windows(16))
    with pytest.raises(ValueError, match=r"set model\.horizons to 2x0"):
        trainer(tmp_path).validate(module(data), data, verbose=False)


def test_changed_horizons_are_a_one_pass_mask_over_the_same_weights(tmp_path: Path) -> None:
    data = recall_data()
    lm = module(data)
    trained = trainer(tmp_path, max_steps=2)
    trained.fit(lm, data)
    path = tmp_path / "weights.ckpt"
    trained.save_checkpoint(path, weights_only=True)
    tokens_BN = torch.randint(0, 392, (1, 256), generator=torch.Generator().manual_seed(0))
    for horizons in (None, "2x0", "1x16+1x64", "2x256"):
        network = load_model(path, horizons=horizons).backbone.double()
        assert network.horizons == ((128, 32) if horizons is None else parse_horizons(horizons))
        masks = [boundary_mask(256, 64, horizon) for horizon in network.horizons]
        expected = one_pass(network, tokens_BN, masks)
        torch.testing.assert_close(stream(network, tokens_BN), expected, atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="for 2 layers"):
        load_model(path, horizons="3x16")


def test_validation_leaves_the_training_memory_untouched(tmp_path: Path) -> None:
    seen = []

    class Watched(RecurrentLM):
        def on_validation_epoch_start(self) -> None:
            super().on_validation_epoch_start()
            self.before = copy.deepcopy(self.memories["train"].state_dict())

        def on_validation_epoch_end(self) -> None:
            assert self.memories["validation"].clock > 0
            super().on_validation_epoch_end()
            assert set(self.memories) == {"train"}
            torch.testing.assert_close(self.memories["train"].state_dict(), self.before, atol=0, rtol=0)
            seen.append(self.memories["train"].clock)

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


def test_memory_is_written_after_the_optimizer_step_or_within_an_accumulation_after_backward(tmp_path: Path) -> None:
    clocks: list[tuple[str, int]] = []

    class Watched(RecurrentLM):
        def note(self, when: str) -> None:
            clocks.append((when, self.memories["train"].clock))

        def on_before_backward(self, loss: torch.Tensor) -> None:
            self.note("backward")

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.note("optimizer")

        def on_train_batch_end(self, *_: Any) -> None:
            self.note("end")

    data = recall_data()
    lm = Watched("1x128+1x32", backbone, vocab_size=data.vocab_size, segment_length=64)
    trainer(tmp_path, max_steps=2, accumulate_grad_batches=2).fit(lm, data)
    first, second = clocks[: len(clocks) // 2], clocks[len(clocks) // 2 :]
    assert [when for when, _ in first] == ["backward", "end", "backward", "optimizer", "end"]
    assert [clock for _, clock in first] == [0, 64, 64, 64, 128]
    assert [clock for _, clock in second] == [128, 192, 192, 192, 256]


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


def weights_after(
    folder: Path, lm: RecurrentLM, data: MusicData, steps: int, *others: Callback, accelerator: str = "cpu"
) -> dict:
    """Train to `steps`, from the folder's last checkpoint if it has one."""
    folder.mkdir(exist_ok=True)
    last = folder / "last.ckpt"
    callbacks = [*others, LastCheckpoint(folder, 5)]
    settings: dict[str, Any] = {"enable_checkpointing": True, "val_check_interval": 10, "accelerator": accelerator}
    run = trainer(folder, max_steps=steps, callbacks=callbacks, **settings)
    run.fit(lm, data, ckpt_path=last if last.exists() else None, weights_only=True)
    return copy.deepcopy(lm.backbone.state_dict())


class KilledError(Exception):
    """Stands for a killed process: no hook of Lightning saves anything."""


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KilledError


class KillInValidation(Callback):
    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            raise KilledError


def fixed_rate(groups: Any) -> AdamW:
    return AdamW(groups, lr=1e-2)


def fresh() -> tuple[RecurrentLM, MusicData]:
    """A module with dropout and a stream with transposition, 14 steps an epoch."""
    task = RecallTask(distances=(64, 400), num_train=8, num_validation=1)
    data = MusicData(recall=task, segment_length=64, num_lanes=4, transpose=3)
    settings: dict[str, Any] = {"optimizer": fixed_rate, "vocab_size": data.vocab_size, "segment_length": 64}
    settings["lr_scheduler"] = lambda optimizer: WarmupCosine(optimizer, warmup_steps=3, total_steps=40)
    torch.manual_seed(0)
    return RecurrentLM("1x128+1x32", lambda **sizes: backbone(**sizes, dropout=0.1), **settings), data


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSMR_CACHE", str(tmp_path_factory.mktemp("cache")))
        return weights_after(tmp_path_factory.mktemp("whole"), *fresh(), 40)


@pytest.mark.parametrize("killed_at", [7, 10, 14, 28, 33])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, uninterrupted: dict, killed_at: int
) -> None:
    """Killed inside an epoch, beside a validation and at the ends of the epochs; saved every 5 steps."""
    assert len(fresh()[1].train_dataloader()) == 14
    with pytest.raises(KilledError):
        weights_after(tmp_path, *fresh(), 40, KillAt(killed_at))
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == killed_at // 5 * 5
    torch.manual_seed(99)
    lm, data = fresh()
    with torch.no_grad():
        lm.backbone.embedding.weight.zero_()
    resumed = weights_after(tmp_path, lm, data, 40)
    for name, value in uninterrupted.items():
        assert torch.equal(value, resumed[name]), name


def test_a_run_killed_in_its_last_validation_repeats_it_when_resumed(tmp_path: Path) -> None:
    best = BestCheckpoint(tmp_path / "whole")
    whole = weights_after(tmp_path / "whole", *fresh(), 20, best)
    with pytest.raises(KilledError):
        weights_after(tmp_path / "killed", *fresh(), 20, KillInValidation(), BestCheckpoint(tmp_path / "killed"))
    assert read_checkpoint(tmp_path / "killed" / "last.ckpt")["global_step"] == 20

    lm, data = fresh()
    settings: dict[str, Any] = {"max_steps": 20, "enable_checkpointing": True, "val_check_interval": 7}
    run = trainer(tmp_path, callbacks=[BestCheckpoint(tmp_path), LastCheckpoint(tmp_path)], **settings)
    with pytest.raises(ValueError, match=r"which these options leave out"):
        run.fit(lm, data, ckpt_path=tmp_path / "killed" / "last.ckpt", weights_only=True)

    again = BestCheckpoint(tmp_path / "killed")
    resumed = weights_after(tmp_path / "killed", *fresh(), 20, again)
    assert again.best_model_score == best.best_model_score
    assert again.current_score == best.current_score
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name

    once_more = BestCheckpoint(tmp_path / "killed")  # which has nothing left to do
    weights_after(tmp_path / "killed", *fresh(), 20, once_more)
    assert read_checkpoint(tmp_path / "killed" / "last.ckpt")["global_step"] == 20
    assert once_more.best_model_score == best.best_model_score
    longer = weights_after(tmp_path / "killed", *fresh(), 30, BestCheckpoint(tmp_path / "killed"))
    for name, value in weights_after(tmp_path / "longer", *fresh(), 30).items():
        assert torch.equal(value, longer[name]), name


def test_a_run_with_muon_resumes_to_the_same_weights(tmp_path: Path) -> None:
    def muon() -> tuple[RecurrentLM, MusicData]:
        lm, data = fresh()
        lm.optimizer = lambda groups: Muon(groups, lr=1e-2)
        return lm, data

    whole = weights_after(tmp_path / "whole", *muon(), 12)
    with pytest.raises(KilledError):
        weights_after(tmp_path / "killed", *muon(), 12, KillAt(8))
    resumed = weights_after(tmp_path / "killed", *muon(), 12)
    adamw = weights_after(tmp_path / "adamw", *fresh(), 12)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert not torch.equal(whole["blocks.0.gate_up.weight"], adamw["blocks.0.gate_up.weight"])


def test_muon_trains_the_matrices_of_the_layers(tmp_path: Path) -> None:
    lm = module(recall_data(), optimizer=Muon)
    lm.trainer = trainer(tmp_path, max_steps=3000)
    configured: Any = lm.configure_optimizers()
    (marked, *_), names = configured["optimizer"].parts, {p: name for name, p in lm.backbone.named_parameters()}
    found = {names[p] for group in marked.param_groups for p in group["params"]}
    assert found == {name for name, p in lm.backbone.named_parameters() if name.startswith("blocks.") and p.dim() == 2}


def test_muon_is_given_the_projections_that_a_matrix_stacks(tmp_path: Path) -> None:
    lm = module(recall_data(), optimizer=Muon)
    lm.trainer = trainer(tmp_path, max_steps=3000)
    configured: Any = lm.configure_optimizers()
    muon, names = configured["optimizer"].parts[0], {p: name for name, p in lm.backbone.named_parameters()}
    block = lm.backbone.blocks[0]
    rows = {names[p]: counts for p, counts in muon._rows.items()}
    d_model, hidden = lm.backbone.embedding.embedding_dim, block.down.in_features
    kv = lm.backbone.settings.kv_width
    assert rows["blocks.0.query_key_value.weight"] == [d_model, kv, kv]
    assert rows["blocks.0.gate_up.weight"] == [hidden, hidden]
    assert rows["blocks.0.down.weight"] == [d_model]


def poisoned(call: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give lane 2 a loss of `value` in one call."""
    calls = []

    def token_nll_or_worse(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        nll_BT = token_nll(logits_BTV, targets_BT)
        return nll_BT * torch.tensor([1.0, 1.0, value, 1.0])[:, None] if len(calls) == call else nll_BT

    for user in ("step", "scores"):
        monkeypatch.setattr(f"dsmr.training.{user}.token_nll", token_nll_or_worse)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_and_names_the_piece(
    tmp_path: Path, value: float, uninterrupted: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, data = fresh()
    poisoned(8, value, monkeypatch)
    with pytest.raises(NotFiniteError) as caught:
        weights_after(tmp_path, lm, data, 40)
    batch = list(fresh()[1].train_dataloader())[7]
    name = data.store.pieces[int(batch.piece_B[2])].name
    assert f"the loss is not finite at step 8, in {name} from token {int(batch.position_B[2]):,} on" in str(
        caught.value
    )
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 7
    monkeypatch.undo()
    monkeypatch.setenv("DSMR_CACHE", str(data.store.path.parent))
    resumed = weights_after(tmp_path, *fresh(), 40)
    for weight, expected in uninterrupted.items():
        assert torch.equal(expected, resumed[weight]), weight


def test_a_gradient_that_is_not_finite_stops_before_the_weights(tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.global_step == 6:
                pl_module.backbone.embedding.weight.grad[0, 0] = torch.inf

    lm, data = fresh()
    with pytest.raises(NotFiniteError, match=r"a gradient is not finite at step 7, in .* from token"):
        weights_after(tmp_path, lm, data, 40, Spoil())
    assert all(weight.isfinite().all() for weight in lm.parameters())
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 6


def test_a_bad_loss_within_an_accumulation_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(14, torch.nan, monkeypatch)
    lm, data = fresh()
    settings = {"accumulate_grad_batches": 2, "val_check_interval": 1000, "check_val_every_n_epoch": None}
    callbacks = [LastCheckpoint(tmp_path, 5)]
    run = trainer(tmp_path, max_steps=40, callbacks=callbacks, enable_checkpointing=True, **settings)
    with pytest.raises(NotFiniteError, match="at step 7"):
        run.fit(lm, data)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 5


def test_a_validation_that_is_not_finite_names_the_first_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, data = fresh()
    poisoned(2, torch.nan, monkeypatch)
    lm.eval()
    task = RecallTask(distances=(64, 400), num_train=8, num_validation=4)
    data = MusicData(recall=task, segment_length=64, num_lanes=4)
    batch = list(data.val_dataloader())[1]
    name = data.store.pieces[int(batch.piece_B[2])].name
    with pytest.raises(NotFiniteError, match=f"first in {name} from token {int(batch.position_B[2])} on"):
        trainer(tmp_path).validate(lm, data, verbose=False)


@pytest.mark.parametrize(("minutes", "saved"), [(1e-9, 6), (60.0, None)])
def test_a_checkpoint_is_saved_by_time_too(tmp_path: Path, minutes: float, saved: int | None) -> None:
    lm, data = fresh()
    callbacks = [KillAt(6), LastCheckpoint(tmp_path, 1000, minutes)]
    run = trainer(tmp_path, max_steps=40, callbacks=callbacks, enable_checkpointing=True, val_check_interval=10)
    with pytest.raises(KilledError):
        run.fit(lm, data)
    assert (tmp_path / "last.ckpt").exists() == (saved is not None)
    if saved is not None:
        assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == saved


def test_a_sanity_check_before_training_leaves_the_counters_alone(tmp_path: Path) -> None:
    lm, data = fresh()
    callbacks = [LastCheckpoint(tmp_path, 1)]
    trainer(tmp_path, max_steps=1, callbacks=callbacks, enable_checkpointing=True, num_sanity_val_steps=2).fit(
        lm, data
    )
    loop = read_checkpoint(tmp_path / "last.ckpt")["loops"]["fit_loop"]
    assert loop["epoch_loop.state_dict"]["_batches_that_stepped"] == 1
    assert loop["epoch_loop.batch_progress"]["total"]["completed"] == 1


def test_the_last_checkpoint_knows_the_best_score_of_a_validation_at_its_own_step(tmp_path: Path) -> None:
    best = BestCheckpoint(tmp_path)
    weights_after(tmp_path, *fresh(), 10, best)
    assert best.best_model_score is not None
    states = read_checkpoint(tmp_path / "last.ckpt")["callbacks"]
    (saved,) = [state for name, state in states.items() if name.startswith("BestCheckpoint")]
    assert saved["best_model_score"] == best.best_model_score


def test_a_moved_run_still_knows_its_best_score(tmp_path: Path) -> None:
    best = BestCheckpoint(tmp_path / "old")
    weights_after(tmp_path / "old", *fresh(), 10, best)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = BestCheckpoint(tmp_path / "new")
    weights_after(tmp_path / "new", *fresh(), 11, moved)
    assert moved.best_model_score == best.best_model_score
    assert moved.best_model_path == str(tmp_path / "new/best.ckpt")


def test_a_longer_run_follows_the_new_cosine(tmp_path: Path) -> None:
    optimizer = fixed_rate([torch.nn.Parameter(torch.zeros(2))])
    saved = WarmupCosine(optimizer, 3, total_steps=20).state_dict()
    longer = WarmupCosine(optimizer, 3, total_steps=40)
    longer.load_state_dict(saved)
    assert longer.total_steps == 40


@pytest.mark.parametrize("change", [{"d_model": 32}, {"segment_length": 128}, {"vocab_size": 400}])
def test_another_network_is_refused_by_name(change: dict[str, int]) -> None:
    saved = describe_network(backbone(392, "2x64", 64), None)
    (name,) = change

    def changed(change: dict) -> dict:
        return saved | {"config": saved["config"] | change}

    with pytest.raises(ValueError, match=f"{name} = {saved['config'][name]}, now it is {change[name]}"):
        check_same_network(saved, changed(change), horizons_too=False)
    check_same_network(saved, changed({"horizons": [0, 0], "dropout": 0.5}), horizons_too=False)
    with pytest.raises(ValueError, match="horizons = 2x64, now it is 2x0"):
        check_same_network(saved, changed({"horizons": [0, 0]}), horizons_too=True)
    with pytest.raises(ValueError, match="memory_gate = False, now it is True"):
        check_same_network(saved, changed({"memory_gate": -4.0}), horizons_too=False)
    check_same_network(changed({"memory_gate": 0.0}), changed({"memory_gate": -4.0}), horizons_too=True)
    with pytest.raises(ValueError, match="backbone = RecurrentTransformer, now it is PerceiverAR"):
        check_same_network(saved, saved | {"backbone": "PerceiverAR"}, horizons_too=False)


def test_sums_stay_exact_when_the_module_is_cast_to_half_precision() -> None:
    metric = torch.nn.ModuleList([TokenNLL()]).to(torch.bfloat16)[0]
    ones = torch.ones(1, 1001)
    for _ in range(3):
        metric.update(ones, ones.bool(), ones.bool(), torch.tensor([1_000_001]))
    assert float(metric.compute()["tokens"]) == 3003
    metric.reset()
    assert metric.nll.dtype == torch.float64


def test_a_checkpoint_alone_rebuilds_network_and_tokenizer(tmp_path: Path) -> None:
    data = recall_data()
    lm = module(data)
    weights_after(tmp_path, lm, data, 3)
    loaded = load_model(tmp_path / "last.ckpt")
    assert loaded.backbone.horizons == (128, 32)
    assert loaded.tokenizer == {"name": "performance", "config": {}}
    assert all(torch.equal(v, loaded.backbone.state_dict()[k]) for k, v in lm.backbone.state_dict().items())
    assert read_checkpoint(tmp_path / "last.ckpt")["dsmr"]["rule"] == "boundary"


def test_a_checkpoint_of_weights_carries_no_memory_and_no_place(tmp_path: Path) -> None:
    data = recall_data()
    lm = module(data)
    run = trainer(tmp_path, max_steps=3)
    run.fit(lm, data)
    run.save_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    run.save_checkpoint(tmp_path / "last.ckpt")
    best, last = (read_checkpoint(tmp_path / name) for name in ("best.ckpt", "last.ckpt"))
    assert not is_resumable(best)
    assert "memory" not in best["dsmr"]
    assert "MusicData" not in best
    assert last["dsmr"]["memory"]["clock"] == 3 * 64
    assert last["MusicData"]["next_step"] == 3


def test_a_foreign_or_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such run"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no best.ckpt"):
        find_checkpoint(tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="not written by dsmr"):
        load_model(tmp_path / "foreign.ckpt")
    torch.save({"x": Path("code")}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match="cannot be loaded safely"):
        load_model(tmp_path / "code.ckpt")


def test_token_nll_sums_before_it_divides() -> None:
    metric = TokenNLL()
    real = torch.tensor([[True, True, True, False]])
    metric.update(torch.tensor([[1.0, 2.0, 3.0, 0.0]]), real, real.clone(), torch.tensor([2_000_000]))
    metric.update(
        torch.tensor([[6.0, 0.0, 0.0, 0.0]]),
        torch.tensor([[True, False, False, False]]),
        ~real,
        torch.tensor([1_000_000]),
    )
    result = {name: float(value) for name, value in metric.compute().items()}
    assert result == pytest.approx(
        {"nll": 3.0, "perplexity": math.exp(3.0), "nats_per_note": 4.0, "nats_per_second": 4.0, "tokens": 4.0}
    )
    assert metric.nll.dtype == torch.float64


def fused_adamw(groups: Any) -> AdamW:
    """Return AdamW in torch's fused kernels, as on CUDA; they obey `found_inf` on the CPU too."""
    optimizer = AdamW(groups, lr=1e-2)
    for group in optimizer.param_groups:
        group["fused"] = True
    return optimizer


def fused_muon(groups: Any) -> Muon:
    """Return Muon whose AdamW is fused, as on CUDA."""
    optimizer = Muon(groups, lr=1e-2)
    for part in optimizer.parts[1:]:
        for group in part.param_groups:
            group["fused"] = True
    return optimizer


class WatchReads(HostFlag):
    """Notes when a flag is read."""

    events: ClassVar[list[str]] = []

    def read(self) -> bool:
        """Note the read."""
        self.events.append("read")
        return super().read()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps of the optimizer and all reads of the device by the training step, in order."""
    WatchReads.events = events = []
    monkeypatch.setattr("dsmr.training.step.HostFlag", WatchReads)
    for name in ("__bool__", "__float__", "__int__", "item", "tolist"):
        read = getattr(torch.Tensor, name)

        def noted(self: torch.Tensor, read: Any = read, name: str = name) -> Any:
            frame = sys._getframe(1)
            is_ours = frame.f_globals.get("__name__") in [
                f"dsmr.training.{m}" for m in ("step", "module", "optimizers")
            ]
            if is_ours and frame.f_code is not HostFlag.read.__code__:
                events.append(f"{name} in {frame.f_code.co_name}")
            return read(self)

        monkeypatch.setattr(torch.Tensor, name, noted)
    return events


@pytest.mark.parametrize(
    ("optimizer", "order"),
    [
        (fused_adamw, ["optimizer step", "read"]),  # as on CUDA: the step is queued first
        (fused_muon, ["optimizer step", "read"]),
        (fixed_rate, ["read", "optimizer step"]),  # as on the CPU
    ],
)
def test_a_step_reads_one_flag_and_fused_optimizers_are_queued_before_it(
    tmp_path: Path, events: list[str], optimizer: Any, order: list[str]
) -> None:
    lm, data = fresh()

    def watched(groups: Any) -> Any:
        built = optimizer(groups)
        built.register_step_post_hook(lambda *_: events.append("optimizer step"))
        return built

    lm.optimizer = watched
    trainer(tmp_path, max_steps=4, limit_val_batches=0).fit(lm, data)
    assert events == order * 4


@pytest.mark.parametrize("optimizer", [fused_adamw, fused_muon])
@pytest.mark.parametrize("failure", ["loss", "gradient"])
def test_a_queued_step_that_fails_changes_nothing(
    tmp_path: Path, optimizer: Any, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that failed is repeated after resuming, and the run ends like one in which it never failed."""

    class Spoil(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.global_step == 7:
                pl_module.backbone.embedding.weight.grad[0, 0] = torch.nan

    def built() -> tuple[RecurrentLM, MusicData]:
        lm, data = fresh()
        lm.optimizer = optimizer
        return lm, data

    whole = weights_after(tmp_path / "whole", *built(), 12)
    lm, data = built()
    before: dict[str, Any] = {}

    class Keep(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 7:
                before["weights"] = copy.deepcopy(lm.state_dict())
                before["optimizer"] = copy.deepcopy(trainer.optimizers[0].state_dict())
                before["memory"] = copy.deepcopy(lm.memories["train"].state_dict())
                before["stream"] = data.state_dict()

        def on_exception(self, trainer: Trainer, *_: Any) -> None:
            before["optimizer after"] = trainer.optimizers[0].state_dict()

    with monkeypatch.context() as patch:
        if failure == "loss":
            poisoned(8, torch.nan, patch)
        spoil = [Spoil()] if failure == "gradient" else []
        with pytest.raises(NotFiniteError, match=f"the loss|a {failure}") as caught:
            weights_after(tmp_path / "failed", lm, data, 12, Keep(), *spoil)
    assert "at step 8" in str(caught.value)
    same = {"atol": 0, "rtol": 0}
    torch.testing.assert_close(dict(lm.state_dict()), dict(before["weights"]), **same)
    torch.testing.assert_close(before["optimizer after"]["state"], before["optimizer"]["state"], **same)
    torch.testing.assert_close(lm.memories["train"].state_dict(), before["memory"], **same)
    assert data.state_dict() == before["stream"]
    assert read_checkpoint(tmp_path / "failed" / "last.ckpt")["global_step"] == 7
    resumed = weights_after(tmp_path / "failed", *built(), 12)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_a_late_flag_within_an_accumulation_names_its_own_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = TrainingStep._check

    def late(self: TrainingStep, is_finite: torch.Tensor, *, is_late: bool) -> None:
        check(self, is_finite, is_late=True)  # as on CUDA

    monkeypatch.setattr(TrainingStep, "_check", late)
    poisoned(13, torch.nan, monkeypatch)
    lm, data = fresh()
    lm.optimizer = fused_adamw
    batch = list(fresh()[1].train_dataloader())[12]
    name = data.store.pieces[int(batch.piece_B[2])].name
    run = trainer(tmp_path, max_steps=40, accumulate_grad_batches=2, limit_val_batches=0)
    with pytest.raises(NotFiniteError, match=f"the loss is not finite at step 7, in {name} from token"):
        run.fit(lm, data)
    assert all(weight.isfinite().all() for weight in lm.parameters())


def test_an_early_loss_of_inf_with_finite_gradients_keeps_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, plain, seen = TrainingStep._check, token_nll, []

    def late(self: TrainingStep, is_finite: torch.Tensor, *, is_late: bool) -> None:
        check(self, is_finite, is_late=True)  # as on CUDA

    def infinite(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        seen.append(None)
        nll_BT = plain(logits_BTV, targets_BT)
        return nll_BT + torch.inf if len(seen) == 13 else nll_BT  # the first of two segments; a constant

    monkeypatch.setattr(TrainingStep, "_check", late)
    monkeypatch.setattr("dsmr.training.step.token_nll", infinite)
    lm, data = fresh()
    lm.optimizer = fused_adamw
    steps: list[dict[str, torch.Tensor]] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step > len(steps):
                steps.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    run = trainer(tmp_path, max_steps=40, accumulate_grad_batches=2, limit_val_batches=0)
    run.callbacks.append(Keep())
    with pytest.raises(NotFiniteError, match="the loss is not finite at step 7"):
        run.fit(lm, data)
    assert len(steps) == 6
    assert all(torch.equal(value, steps[-1][name]) for name, value in lm.state_dict().items())


def test_a_memory_of_another_number_of_lanes_is_refused() -> None:
    network = tiny_transformer()
    memories = SplitMemories(network)
    memories.restored = network.init_memory(8).state_dict()
    with pytest.raises(UserError, match="the run has 8 lanes, now there are 4"):
        memories.get_or_init("train", 4)
    assert memories.get_or_init("train", 4, 1, 2).num_lanes == 4


def test_a_scaled_step_is_left_to_the_gradient_scaler() -> None:
    """GradScaler unscales within steps that say they support it, behind our clipping."""
    net = torch.nn.Linear(2, 2)
    for optimizer in (fused_adamw([{"params": list(net.parameters())}]), AdamW(net.parameters())):
        assert not getattr(optimizer, "_step_supports_amp_scaling", False)


def test_everything_that_a_resumed_run_restores_is_listed(tmp_path: Path) -> None:
    weights_after(tmp_path, *fresh(), 3, BestCheckpoint(tmp_path))
    content = read_checkpoint(tmp_path / "last.ckpt")
    described = set(describe_network(fresh()[0].backbone, None))
    kept = {f"dsmr.{key}" for key in content["dsmr"].keys() - described}
    assert {*content, *kept} == {*RESTORED, *CHECKED} - {"MixedPrecision"}  # a CPU has no gradient scaler
    assert not {*RESTORED} & {*CHECKED}
    best = {**content, **{f"dsmr.{key}": value for key, value in content["dsmr"].items()}}
    assert all(best[place] for place in RESTORED.keys() - {"MixedPrecision"})
    names = {name.partition("{")[0] for name in content["callbacks"]}
    assert all(name in RESTORED["callbacks"] for name in names)
    assert names == {"BestCheckpoint", "LastCheckpoint"}


def test_the_gradient_scaler_is_saved_under_its_listed_name() -> None:
    assert MixedPrecision.__qualname__ in RESTORED
