"""What has to hold on a GPU as well; the same on a CPU shows that the tests themselves are sound.

B lanes, T segment, N tokens of a piece, V vocabulary.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dsmr.attention.backends import Backend
from dsmr.data.datamodule import MusicData
from dsmr.data.synthetic import RecallTask
from dsmr.data.tokenizer import TokenizerSpec, build_tokenizer, decode, encode
from dsmr.data.vocabulary import BOS
from dsmr.generate import Generator, Sampling
from dsmr.model import RecurrentTransformer
from dsmr.model.sizes import Compilation
from dsmr.results.run_files import read_checkpoint
from dsmr.training.losses import NotFiniteError
from dsmr.training.module import RecurrentLM
from dsmr.training.optimizers import AdamW, Muon, WarmupCosine
from test_memory import boundary_mask, one_pass
from test_module import KillAt, KilledError, trainer, weights_after

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = pytest.param("cuda", marks=GPU)
SEGMENT, VOCABULARY = 128, 32


def network(
    device: str, horizons: str = "1x256+1x128+1x0", vocabulary: int = VOCABULARY, **changes: Any
) -> RecurrentTransformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 128, "num_layers": 3, "num_heads": 2, "dropout": 0.0, "init_std": 0.2}
    return RecurrentTransformer(vocabulary, horizons, SEGMENT, **{**sizes, **changes}).to(device)


def segments(device: str, count: int, num_lanes: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (B, T), and which lanes begin a piece, some of them in the middle of the others'."""
    for number in range(count):
        draws = torch.Generator().manual_seed(number)
        tokens_BT = torch.randint(0, VOCABULARY, (num_lanes, SEGMENT), generator=draws)
        is_start_B = torch.tensor([number == 0, number == 3, number % 4 == 0, False])
        yield tokens_BT.to(device), is_start_B.to(device)


def logits_and_gradients(model: RecurrentTransformer, device: str, count: int = 5) -> list[Tensor]:
    memory, found = model.init_memory(4), []
    for tokens_BT, is_start_B in segments(device, count):
        logits_BTV, update = model(tokens_BT, memory, is_start_B)
        F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten()).backward()
        memory.commit(update)
        found.append(logits_BTV.detach())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    return [*found, *gradients]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("form", ["auto", "materialised"])
@pytest.mark.parametrize("rule", ["boundary", "sliding"])
@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 1}, {"memory_gate": -1.0}], ids=["plain", "grouped", "gate"])
def test_every_form_equals_the_reference(device: str, form: Backend, rule: str, changes: dict[str, Any]) -> None:
    mine, plain = (
        logits_and_gradients(network(device, attention=each, rule=rule, **changes), device)
        for each in (form, "reference")
    )
    for part, wanted in zip(mine, plain, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("rule", ["boundary", "sliding"])
@pytest.mark.parametrize("compile_blocks", [False, True, "together"])
@pytest.mark.filterwarnings("ignore:.*TensorFloat32 tensor cores.*")
def test_an_epoch_compiles_nothing_anew(device: str, rule: str, compile_blocks: Compilation) -> None:
    torch._dynamo.reset()
    model = network(device, rule=rule, compile_blocks=compile_blocks)
    plain = network(device, rule=rule, attention="reference")
    memories = {name: model.init_memory(4) for name in ("train", "validation")}
    plain_memory = plain.init_memory(4)
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, torch._dynamo.config, "error_on_recompile", False)
        for number, (tokens_BT, is_start_B) in enumerate(segments(device, 16)):
            logits_BTV, update = model(tokens_BT, memories["train"], is_start_B)
            F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten()).backward()
            memories["train"].commit(update)
            with torch.no_grad():
                wanted_BTV, plain_update = plain(tokens_BT, plain_memory, is_start_B)
                plain_memory.commit(plain_update)
                torch.testing.assert_close(logits_BTV, wanted_BTV, rtol=1e-2, atol=1e-2)
                if number % 5 == 0:  # with a memory that has read less
                    memories["validation"].commit(model(tokens_BT, memories["validation"], is_start_B)[1])
            torch._dynamo.config.error_on_recompile = True


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("horizons", ["3x384", "1x384+1x128+1x0"])
def test_streamed_in_bfloat16_stays_near_one_pass_in_float32(device: str, horizons: str) -> None:
    model = network(device, horizons, init_std=0.05)
    tokens_BN = torch.randint(0, VOCABULARY, (2, 4 * SEGMENT), generator=torch.Generator().manual_seed(1)).to(device)
    masks = [boundary_mask(tokens_BN.shape[1], SEGMENT, horizon).to(device) for horizon in model.horizons]
    with torch.no_grad():
        whole_BNV = one_pass(model, tokens_BN, masks)
        parts = []
        with torch.autocast(device, dtype=torch.bfloat16):
            memory = model.init_memory(2)
            assert memory.dtype == torch.bfloat16
            for number, tokens_BT in enumerate(tokens_BN.split(SEGMENT, dim=1)):
                logits_BTV, update = model(tokens_BT, memory, torch.full((2,), number == 0, device=device))
                memory.commit(update)
                parts.append(logits_BTV.float())
    streamed_BNV = torch.cat(parts, dim=1)
    assert (streamed_BNV - whole_BNV).abs().max() < 0.03 * whole_BNV.abs().max()
    nll, wanted = (F.cross_entropy(x.flatten(0, 1), tokens_BN.flatten()) for x in (streamed_BNV, whole_BNV))
    assert float((nll - wanted).abs()) < 1e-3 * float(wanted)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("rule", ["boundary", "sliding"])
def test_token_by_token_equals_segment_by_segment(device: str, rule: str) -> None:
    model = network(device, rule=rule).eval()
    memory, token_by_token = model.init_memory(2), model.init_memory(2, decoding=True)
    for number in range(3):
        tokens_BT = torch.randint(0, VOCABULARY, (2, SEGMENT), generator=torch.Generator().manual_seed(number))
        tokens_BT = tokens_BT.to(device)
        with torch.inference_mode():
            whole_BTV, update = model(tokens_BT, memory)
            memory.commit(update)
            parts = []
            for token_B1 in tokens_BT.split(1, dim=1):
                logits_B1V, update = model(token_B1, token_by_token)
                token_by_token.commit(update)
                parts.append(logits_B1V)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole_BTV, rtol=1e-2, atol=1e-2)


def fresh() -> tuple[RecurrentLM, MusicData]:
    """A module with dropout and a stream with transposition, of sizes that every form has."""
    task = RecallTask(distances=(64, 400), num_train=8, num_validation=1)
    data = MusicData(recall=task, segment_length=SEGMENT, num_lanes=4, transpose=3)

    def backbone(vocab_size: int, horizons: Any, segment_length: int) -> RecurrentTransformer:
        return RecurrentTransformer(
            vocab_size, horizons, segment_length, d_model=64, num_layers=2, num_heads=2, dropout=0.1
        )

    torch.manual_seed(0)
    module = RecurrentLM(
        "1x256+1x128",
        backbone,
        vocab_size=data.vocab_size,
        segment_length=SEGMENT,
        optimizer=lambda groups: AdamW(groups, lr=3e-3),
        lr_scheduler=lambda optimizer: WarmupCosine(optimizer, warmup_steps=3, total_steps=40),
    )
    return module, data


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_killed_and_resumed_run_goes_where_the_uninterrupted_one_goes(tmp_path: Path, device: str) -> None:
    accelerator = "gpu" if device == "cuda" else device
    begun = {name: value.clone() for name, value in fresh()[0].backbone.state_dict().items()}
    whole = weights_after(tmp_path / "whole", *fresh(), 12, accelerator=accelerator)
    with pytest.raises(KilledError):
        weights_after(tmp_path / "killed", *fresh(), 12, KillAt(8), accelerator=accelerator)
    torch.manual_seed(99)  # what draws from here on is restored
    resumed = weights_after(tmp_path / "killed", *fresh(), 12, accelerator=accelerator)
    for name, value in whole.items():  # kernels on a GPU may sum in another order
        moved = (value.cpu() - begun[name]).norm()
        assert float((value - resumed[name]).norm()) <= (0.0 if device == "cpu" else 1e-2) * float(moved), name
        assert moved > 0


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("rule", ["boundary", "sliding"])
@pytest.mark.filterwarnings("ignore:.*TensorFloat32 tensor cores.*")
def test_prompts_of_all_lengths_are_read_without_compiling_anew(device: str, rule: str) -> None:
    torch._dynamo.reset()
    tokenizer = build_tokenizer(TokenizerSpec())
    sizes: dict[str, Any] = {"d_model": 64, "num_layers": 3, "num_heads": 2, "init_std": 0.2, "rule": rule}
    made, plain = (
        network(device, vocabulary=len(tokenizer), attention=form, **sizes).eval() for form in ("auto", "reference")
    )
    with contextlib.ExitStack() as stack, torch.inference_mode():
        stack.callback(setattr, torch._dynamo.config, "error_on_recompile", False)
        for length in (300, 1, 2, 127, 128, 129, 255, 256, 257, 700):
            ids = torch.randint(4, len(tokenizer), (length,), generator=torch.Generator().manual_seed(length)).tolist()
            found_BV, wanted_BV = (Generator(each, tokenizer).prefill(ids)[0] for each in (made, plain))
            torch.testing.assert_close(found_BV, wanted_BV, rtol=1e-2, atol=1e-2)
            torch._dynamo.config.error_on_recompile = True


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_what_is_drawn_is_music_that_encodes_back(device: str) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(TokenizerSpec())
    sizes: dict[str, Any] = {"d_model": 64, "num_layers": 2, "num_heads": 2, "dropout": 0.0, "init_std": 0.3}
    form: Backend = "materialised" if device == "cuda" else "auto"
    model = RecurrentTransformer(len(tokenizer), "1x256+1x128", SEGMENT, attention=form, **sizes).to(device).eval()
    generator = Generator(model, tokenizer, Sampling(top_p=1.0))
    steps = generator.tokens(num=2, may_end=False)
    lanes = zip(*(next(steps) for _ in range(300)), strict=True)
    for lane in lanes:
        drawn = [BOS, *lane]
        again = list(encode(tokenizer, decode(tokenizer, drawn)).ids)
        assert again[: len(drawn) // 2] == drawn[: len(drawn) // 2]  # what sounds at the end is ended there


@pytest.mark.parametrize("device", [CUDA])
def test_muon_steps_as_torchs_does(device: str) -> None:
    one, two = (network(device) for _ in range(2))
    names = [name for name, p in one.named_parameters() if p.dim() == 2 and "embedding" not in name]
    mine = Muon([{"params": [dict(one.named_parameters())[name] for name in names]}], lr=0.02)
    plain = torch.optim.Muon(
        [dict(two.named_parameters())[name] for name in names], lr=0.02, adjust_lr_fn="match_rms_adamw"
    )
    begun = {name: value.clone() for name, value in two.state_dict().items()}
    for number in range(4):
        for model in (one, two):
            draws = torch.Generator(device).manual_seed(number)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=draws, device=device)
        mine.step()
        plain.step()
    for name in names:
        value, wanted = one.state_dict()[name], two.state_dict()[name]
        assert (value - wanted).norm() < 0.02 * (wanted - begun[name]).norm()


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("optimizer", [AdamW, Muon])
def test_a_failed_step_changes_nothing_and_is_saved(tmp_path: Path, device: str, optimizer: Any) -> None:
    """On CUDA the step is queued before it is known to have failed."""
    before: dict[str, Any] = {}

    class Spoil(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                before.update(weights=copy.deepcopy(pl_module.backbone.state_dict()))
                before.update(optimizer=copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))
                before.update(is_queued=trainer.optimizers[0].obeys_found_inf)

        def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.global_step == 6:
                pl_module.backbone.embedding.weight.grad[0, 0] = torch.nan

        def on_exception(self, trainer: Trainer, *_: Any) -> None:
            before.update(optimizer_after=trainer.optimizers[0].state_dict()["state"])

    lm, data = fresh()
    lm.optimizer = optimizer
    with pytest.raises(NotFiniteError, match="at step 7"):
        weights_after(tmp_path, lm, data, 12, Spoil(), accelerator="gpu" if device == "cuda" else device)
    assert before["is_queued"] == (device == "cuda")
    saved = read_checkpoint(tmp_path / "last.ckpt")
    assert saved["global_step"] == 6
    for name, weight in before["weights"].items():
        assert torch.equal(saved["state_dict"][f"backbone.{name}"], weight.cpu()), name
    torch.testing.assert_close(before["optimizer_after"], before["optimizer"], atol=0, rtol=0)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("optimizer", [AdamW, Muon])
def test_no_training_step_waits_for_the_gpu(tmp_path: Path, device: str, optimizer: Any) -> None:
    """`HostFlag` waits for an event, which the debug mode allows: the GPU has the optimizer's kernels to run."""

    class NoSync(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if device == "cuda" and trainer.global_step >= 3:  # compilation and allocation may wait
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, *_: Any) -> None:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    lm, data = fresh()
    lm.optimizer = optimizer
    settings: dict[str, Any] = {"accelerator": "gpu" if device == "cuda" else device, "limit_val_batches": 0}
    run = trainer(tmp_path, max_steps=6, callbacks=[NoSync()], **settings)
    run.fit(lm, data)
    assert run.global_step == 6
