"""Every implementation of attention equals the reference. B lanes, T segment, M slots, H heads."""

import copy
import logging
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention.flex_attention import create_block_mask

from conftest import ALL_RULES, tiny_transformer
from dsmr.attention import backends as attention_module
from dsmr.attention import decode as step_module
from dsmr.attention.backends import Backend, attend, select_backend
from dsmr.attention.flex import flex, memory_blocks, own_blocks
from dsmr.attention.fused import RMSNorm, gated_product, linear_few_rows, rms_norm
from dsmr.attention.merged import merged
from dsmr.attention.reference import materialised, reference, single_query
from dsmr.attention.visibility import Past, Visibility, find_rule
from dsmr.data.workers import num_usable_cores
from dsmr.model import Memory, PerceiverAR, RecurrentTransformer

# flex runs here as it is, which is slow but exact
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
FORMS = {"merged": merged, "materialised": materialised, "flex": flex}
EXACT = {"rtol": 1e-9, "atol": 1e-11}
# lanes: at a piece's beginning, with a part of what fits, full, long full
LENGTHS = [[0, 0, 0], [0, 8, 16], [16, 16, 999], [8, 24, 999]]


def ages(num_slots: int, clock: int) -> Tensor:
    memory = Memory([num_slots], num_lanes=1, num_kv_heads=1, head_width=2, segment_length=8)
    memory.clock = clock
    return memory.ages_M(0)


def given(
    num_slots: int, num_queries: int, num_open: int, lengths: list[int], rule: str, kv_heads: int, dtype: torch.dtype
) -> tuple[list[Tensor], Past, Visibility]:
    """Random queries, keys, values and past, and what is seen of it; the clock is such that the ring has turned."""
    draws = torch.Generator().manual_seed(num_slots + num_queries)

    def random(heads: int, length: int) -> Tensor:
        return torch.randn(len(lengths), heads, length, 6, generator=draws, dtype=torch.float64).to(dtype)

    own = [random(4, num_queries), random(kv_heads, num_queries), random(kv_heads, num_queries)]
    past = Past(*(random(kv_heads, num_slots + num_open) for _ in range(2)))
    view = Visibility(ages(num_slots, 40), torch.tensor(lengths), num_open, num_queries, find_rule(rule))
    return [part.requires_grad_() for part in own], past, view


def results(form: object, own: list[Tensor], past: Past, view: Visibility, gate: Tensor | None = None) -> list[Tensor]:
    out = form(*own, past, view, gate)  # type: ignore[operator]
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), own if gate is None else [*own, gate])]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("num_slots", "num_queries"), [(16, 8), (4, 8), (0, 8), (256, 130), (24, 1)])
@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("name", ["merged", "materialised"])
def test_a_form_equals_the_reference_forward_and_backward(
    name: str, rule: str, num_slots: int, num_queries: int, kv_heads: int, lengths: list[int]
) -> None:
    own, past, view = given(num_slots, num_queries, 0, lengths, rule, kv_heads, torch.float64)
    for mine, plain in zip(results(FORMS[name], own, past, view), results(reference, own, past, view), strict=True):
        torch.testing.assert_close(mine, plain, **EXACT)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize(("name", "num_slots", "num_queries"), [*product(FORMS, (16, 4, 0), (8,)), ("single", 24, 1)])
def test_a_gate_shifts_what_is_remembered_in_every_form(
    name: str, rule: str, num_slots: int, num_queries: int, kv_heads: int, lengths: list[int]
) -> None:
    own, past, view = given(num_slots, num_queries, 0, lengths, rule, kv_heads, torch.float64)
    gate_H = torch.tensor([0.0, -3.0, 1.5, -0.7], dtype=torch.float64, requires_grad=True)
    form = single_query if name == "single" else FORMS[name]
    wanted = results(reference, own, past, view, gate_H)
    found = [] if name == "flex" else results(form, own, past, view, gate_H)  # flex has no backward here
    for mine, plain in zip(found, wanted, strict=name != "flex"):
        torch.testing.assert_close(mine, plain, **EXACT)
    with torch.no_grad():
        own, gate_H = [part.detach() for part in own], gate_H.detach()
        torch.testing.assert_close(form(*own, past, view, gate_H), wanted[0], **EXACT)
        plain = reference(*own, past, view)
        torch.testing.assert_close(wanted[0][:, 0], plain[:, 0], **EXACT)  # 0 leaves it as it is
        closed = reference(*own, past, view, gate_H - 200)
        mask, grouped = view.own_mask, kv_heads != 4
        alone = F.scaled_dot_product_attention(*own, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        torch.testing.assert_close(closed, alone, **EXACT)


def test_a_gated_network_decodes_as_it_trains_and_its_gates_always_have_gradients() -> None:
    model = tiny_transformer("1x16+1x4+1x0", memory_gate=-1.0, num_kv_heads=1)
    for block in model.blocks:
        torch.nn.init.normal_(block.memory_gate, std=2.0)
    tokens_BN = torch.randint(0, 11, (2, 40), generator=torch.Generator().manual_seed(3))
    whole, decoded = model.init_memory(2), model.init_memory(2, decoding=True)
    for first in range(0, 40, 8):
        logits_BTV, update = model(tokens_BN[:, first : first + 8], whole)
        gates = [block.memory_gate for block in model.blocks]
        grads = torch.autograd.grad(logits_BTV.square().sum(), gates)
        assert all(grad is not None for grad in grads)
        assert [bool(grad.any()) for grad in grads] == [first > 0, first > 0, False]
        whole.commit(update)
        with torch.no_grad():
            for place in range(8):
                logits_B1V, update = model(tokens_BN[:, first + place : first + place + 1], decoded)
                decoded.commit(update)
                torch.testing.assert_close(logits_B1V[:, 0], logits_BTV[:, place].detach(), **EXACT)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize(("num_slots", "num_queries", "num_open"), [(16, 3, 5), (4, 2, 6), (0, 4, 3)])
@pytest.mark.parametrize("name", FORMS)
def test_a_form_equals_the_reference_inside_an_open_segment(
    name: str, rule: str, num_slots: int, num_queries: int, num_open: int, lengths: list[int]
) -> None:
    own, past, view = given(num_slots, num_queries, num_open, lengths, rule, 2, torch.float64)
    own = [part.detach() for part in own]
    torch.testing.assert_close(FORMS[name](*own, past, view), reference(*own, past, view), **EXACT)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize(("num_slots", "num_open"), [(16, 0), (16, 5), (4, 6), (0, 3), (0, 0)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_one_query_equals_the_reference(
    kv_heads: int, num_slots: int, num_open: int, rule: str, lengths: list[int]
) -> None:
    own, past, view = given(num_slots, 1, num_open, lengths, rule, kv_heads, torch.float64)
    for mine, plain in zip(results(single_query, own, past, view), results(reference, own, past, view), strict=True):
        torch.testing.assert_close(mine, plain, **EXACT)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("num_slots", [16, 4, 0])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_sees_what_the_reference_sees(kv_heads: int, num_slots: int, rule: str, lengths: list[int]) -> None:
    # uncompiled and without backward, which it has only on CUDA: this proves the masks and the merging
    own, past, view = given(num_slots, 8, 0, lengths, rule, kv_heads, torch.float64)
    own = [part.detach() for part in own]
    torch.testing.assert_close(flex(*own, past, view), reference(*own, past, view), **EXACT)


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize(("num_slots", "num_queries"), [(16, 8), (128, 128), (200, 130), (1024, 512)])
@pytest.mark.parametrize("clock", [0, 40, 1000])
def test_blocks_of_the_memory_are_those_that_torch_finds(
    clock: int, num_slots: int, num_queries: int, rule: str
) -> None:
    for lengths, num_open in product([[0, 8, num_slots], [num_slots - 1, num_slots + 7, 127]], [0, 3]):
        view = Visibility(ages(num_slots, clock), torch.tensor(lengths), num_open, num_queries, find_rule(rule))
        mine = memory_blocks(view)
        plain = create_block_mask(mine.mask_mod, 3, None, num_queries, num_slots, device="cpu")
        for part, wanted in zip(mine.as_tuple(), plain.as_tuple(), strict=True):
            if isinstance(wanted, Tensor):
                torch.testing.assert_close(part, wanted, rtol=0, atol=0)
                assert part.is_contiguous()
            elif not callable(wanted):
                assert part == wanted


def test_blocks_of_the_segment_are_made_once_and_serve_training_after_a_validation() -> None:
    with torch.inference_mode():
        made = own_blocks((0,) * 128, 0, torch.device("cpu"))
    assert own_blocks((0,) * 128, 0, torch.device("cpu")) is made
    assert not any(part.is_inference() for part in made.as_tuple() if isinstance(part, Tensor))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("name", ["merged", "materialised"])
def test_lower_precision_stays_within_its_bound(name: str, rule: str, dtype: torch.dtype, bound: float) -> None:
    own, past, view = given(128, 64, 0, [0, 64, 999], rule, 2, dtype)
    exact = Past(*(part.double() for part in past))
    wanted = results(reference, [part.detach().double().requires_grad_() for part in own], exact, view)
    for mine, plain in zip(results(FORMS[name], own, past, view), wanted, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - plain).abs().max() <= bound * plain.abs().max()


def test_a_memory_that_asks_for_its_gradient_gets_it() -> None:
    own, past, view = given(16, 8, 0, [0, 8, 999], "boundary", 2, torch.float64)
    past.key.requires_grad_(), past.value.requires_grad_()
    wanted = [*own, past.key, past.value]
    grads = [torch.autograd.grad(form(*own, past, view).square().sum(), wanted) for form in (merged, reference)]
    for mine, plain in zip(*grads, strict=True):
        torch.testing.assert_close(mine, plain, **EXACT)


def test_a_detached_memory_is_not_copied_for_backward() -> None:
    own, past, view = given(256, 16, 0, [999, 999, 999], "boundary", 4, torch.float32)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        merged(*own, past, view)
    ring = {past.key.data_ptr(), past.value.data_ptr()}
    assert ring <= kept.keys()
    others = sum(size for address, size in kept.items() if address not in ring)
    segment = 3 * 16 * 4 * 6 * 4  # lanes, queries, heads, width, bytes
    assert others <= 4.5 * segment  # queries, keys, values, the result, and a number per query


@pytest.mark.parametrize("name", ["merged", "reference", "materialised"])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_network_learns_the_same_in_every_form(name: Backend, rule: str) -> None:
    grads = []
    for form in (name, "reference"):
        model = tiny_transformer("1x16+1x4+1x0", rule=rule, attention=form, num_kv_heads=1).train()
        memory = model.init_memory(2)
        for number in range(4):
            tokens_BT = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(number))
            logits_BTV, update = model(tokens_BT, memory, torch.tensor([number == 2, False]))
            F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten()).backward()
            memory.commit(update)
        grads.append([p.grad for p in model.parameters()])
    for mine, plain in zip(*grads, strict=True):
        torch.testing.assert_close(mine, plain, **EXACT)


def test_activation_checkpointing_changes_memory_and_nothing_else() -> None:
    found, kept = [], []
    for again in (False, True):
        torch.manual_seed(0)
        model = tiny_transformer("3x16", activation_checkpointing=again).train()
        memory = model.init_memory(2)
        size = [0]

        def pack(tensor: Tensor, size: list[int] = size) -> Tensor:
            size[0] += tensor.numel()
            return tensor

        for number in range(3):
            tokens_BT = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(number))
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                logits_BTV, update = model(tokens_BT, memory)
            F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten()).backward()
            memory.commit(update)
        found.append([p.grad for p in model.parameters()])
        kept.append(size[0])
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=0)
    assert kept[1] < kept[0] / 2


def test_how_it_is_computed_is_no_part_of_what_a_checkpoint_says() -> None:
    plain = tiny_transformer("3x16")
    other = tiny_transformer("3x16", attention="materialised", activation_checkpointing=True)
    assert plain.config() == other.config()


@pytest.mark.parametrize(("form", "device"), [("auto", "mps"), ("flex", "cpu"), ("merged", "cuda")])
def test_a_form_that_is_not_there_falls_back_with_one_line(
    form: Backend, device: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "_selected", {})
    with caplog.at_level(logging.WARNING):
        assert select_backend(form, device) == "reference"
        assert select_backend(form, device) == "reference"
    assert len(caplog.records) == 1
    assert device in caplog.text


def test_the_quick_form_is_the_default_on_the_cpu() -> None:
    assert select_backend("auto", "cpu") == "merged"
    assert select_backend("auto", "cuda") == "flex"


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="auto, merged, flex, reference, materialised"):
        tiny_transformer("3x16", attention="fast")  # type: ignore[arg-type]


def test_one_query_takes_the_single_form_unless_the_reference_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    own, past, view = given(16, 1, 0, [16], "boundary", 4, torch.float64)
    calls = []
    monkeypatch.setattr("dsmr.attention.backends.single_query", lambda *_: calls.append("single"))
    attend(*own, past, view, "auto")
    attend(*own, past, view, "reference")
    assert calls == ["single"]


def test_normalisation_and_gate_equal_their_plain_forms() -> None:
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(12).double()
    torch.nn.init.normal_(norm.weight)
    for quick, plain in [
        (lambda: norm(x), lambda: F.rms_norm(x, (12,), norm.weight)),
        (lambda: gated_product(x), lambda: F.silu(x[..., :6]) * x[..., 6:]),
    ]:
        torch.testing.assert_close(quick(), plain(), **EXACT)
        inputs = [x, norm.weight]
        grads = [torch.autograd.grad(f().pow(3).sum(), inputs, allow_unused=True) for f in (quick, plain)]
        for mine, wanted in zip(*grads, strict=True):
            assert (mine is None) == (wanted is None)
            if mine is not None:
                torch.testing.assert_close(mine, wanted, **EXACT)
    rows, weight = x.detach()[0], torch.randn(8, 12, dtype=torch.float64)
    torch.testing.assert_close(linear_few_rows(rows, weight), rows @ weight.T, **EXACT)
    torch.testing.assert_close(linear_few_rows(rows, weight[:7]), rows @ weight[:7].T, **EXACT)
    torch.testing.assert_close(rms_norm(rows, norm.weight), F.rms_norm(rows, (12,), norm.weight), **EXACT)


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("num_lanes", [1, 3, 9])
@pytest.mark.parametrize("backbone", [*ALL_RULES, "perceiver"])
def test_quick_decoding_equals_plain_decoding(
    backbone: str, num_lanes: int, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_compiled:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(step_module, "decode_kernel", lambda: None)
    if backbone == "perceiver":
        sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "prefix_length": 24, "init_std": 0.4}
        model: RecurrentTransformer | PerceiverAR = PerceiverAR(11, 8, **sizes).double().eval()
    else:
        model = tiny_transformer("1x16+1x4+1x0", rule=backbone, num_kv_heads=1)
    tokens_BN = torch.randint(0, 11, (num_lanes, 40), generator=torch.Generator().manual_seed(3))
    found = []
    for grad in (False, True):  # with autograd the layers are called as in training
        memory = model.init_memory(num_lanes, decoding=True)
        logits = []
        with torch.set_grad_enabled(grad):
            for place in range(40):
                logits_B1V, update = model(tokens_BN[:, place : place + 1], memory)
                memory.commit(update)
                logits.append(logits_B1V.detach())
        found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(*found, **EXACT)


TWO_THREADS = """
import torch
from conftest import ALL_RULES, tiny_transformer
torch.set_num_threads(2)
model, found = tiny_transformer("1x16+1x4+1x0"), []
tokens_BN = torch.randint(0, 11, (3, 40), generator=torch.Generator().manual_seed(3))
for grad in (False, True):
    memory, logits = model.init_memory(3, decoding=True), []
    with torch.set_grad_enabled(grad):
        for place in range(40):
            logits_B1V, update = model(tokens_BN[:, place : place + 1], memory)
            memory.commit(update)
            logits.append(logits_B1V.detach())
    found.append(torch.cat(logits, dim=1))
torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
import numba
assert numba.get_num_threads() == 2, numba.get_num_threads()
"""


def test_two_threads_decode_as_one() -> None:
    pytest.importorskip("numba")
    if num_usable_cores() < 2:
        pytest.skip("needs two cores")
    options = {"env": {**os.environ, "NUMBA_NUM_THREADS": "2"}, "cwd": Path(__file__).parent}
    ended = subprocess.run([sys.executable, "-c", TWO_THREADS], capture_output=True, text=True, check=False, **options)
    assert ended.returncode == 0, ended.stderr


def test_decoding_sees_weights_that_were_replaced_and_not_those_of_a_copy() -> None:
    first, second = tiny_transformer("1x16+2x4"), tiny_transformer("1x16+2x4", init_std=0.2)
    tokens_BT = torch.zeros(1, 1, dtype=torch.long)

    def decoded(model: RecurrentTransformer) -> Tensor:
        memory = model.init_memory(1, decoding=True)
        with torch.inference_mode():
            for _ in range(12):
                logits, update = model(tokens_BT, memory)
                memory.commit(update)
        return logits

    before, wanted = decoded(first), decoded(second)
    twin = copy.deepcopy(first)
    first.load_state_dict(second.state_dict(), assign=True)
    torch.testing.assert_close(decoded(first), wanted, **EXACT)
    torch.testing.assert_close(decoded(twin), before, **EXACT)
    with torch.no_grad():
        twin.blocks[0].output.weight.mul_(2)  # type: ignore[union-attr,operator]
    assert not torch.allclose(decoded(twin), before)


def test_decoding_allocates_nothing_that_grows() -> None:
    model = tiny_transformer("1x16+1x4+1x0")
    memory = model.init_memory(2, decoding=True)
    places = [tensor.data_ptr() for tensor in (*memory.keys, *memory.values, *memory.open_keys, *memory.open_values)]
    size = memory.num_bytes
    with torch.inference_mode():
        for _ in range(50):
            memory.commit(model(torch.zeros(2, 1, dtype=torch.long), memory)[1])
    now = [tensor.data_ptr() for tensor in (*memory.keys, *memory.values, *memory.open_keys, *memory.open_values)]
    assert (now, memory.num_bytes) == (places, size)


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("together", [False, True])
def test_compiled_layers_are_compiled_once_for_a_whole_epoch(
    together: bool, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the layers that run on CUDA, traced here without generating code
    model = tiny_transformer("1x256+1x128+1x0", 128, rule=rule, attention="flex").float()
    plain = tiny_transformer("1x256+1x128+1x0", 128, rule=rule, attention="reference").float()
    monkeypatch.setattr(attention_module, "select_backend", lambda name, device: name)
    torch._dynamo.reset()
    for compiled in [model.blocks] if together else model.blocks:
        compiled.compile(dynamic=False, backend="eager", fullgraph=True)
    memories = [model.init_memory(3), plain.init_memory(3)]
    try:
        for number in range(8):
            tokens_BT = torch.randint(0, 11, (3, 128), generator=torch.Generator().manual_seed(number))
            is_start_B = torch.tensor([number == 0, number == 3, number % 4 == 0])
            outs = []
            for network, memory in zip((model, plain), memories, strict=True):
                with torch.no_grad():
                    logits_BTV, update = network(tokens_BT, memory, is_start_B)
                memory.commit(update)
                outs.append(logits_BTV)
            torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
            torch._dynamo.config.error_on_recompile = number > 0
    finally:
        torch._dynamo.config.error_on_recompile = False
        torch._dynamo.reset()
