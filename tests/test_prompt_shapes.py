"""Reading a prompt: the same logits as in training, and few shapes of attention whatever the prompt's length.

FlexAttention stands in for what is compiled on CUDA: here it runs as it is, which is slow but exact.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from conftest import tiny_transformer
from dsmr.attention import backends as attention_module
from dsmr.attention.backends import Implementation
from dsmr.attention.flex import flex, own_blocks
from dsmr.attention.visibility import Visibility
from dsmr.data.tokenizer import TokenizerSpec, build_tokenizer
from dsmr.generate import Generator
from dsmr.model import Backbone, PerceiverAR, RecurrentTransformer
from dsmr.model.backbone import evaluation_copy
from dsmr.model.memory import Memory

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
T = 16
SIZES = {"d_model": 16, "num_layers": 3, "num_heads": 2, "init_std": 0.4, "dropout": 0.0}
NETWORKS = ["boundary", "sliding", "short sliding", "grouped and gated", "perceiver"]
AROUND_BOUNDARIES = [1, 2, 3, T - 1, T, T + 1, 2 * T - 1, 2 * T, 2 * T + 1, 2 * T + 7, 5 * T - 1, 5 * T, 5 * T + 2]


def network(name: str, **changes: object) -> Backbone:
    torch.manual_seed(0)
    if name == "perceiver":
        return PerceiverAR(392, T, prefix_length=24, **SIZES, **changes).double().eval()  # type: ignore[arg-type]
    horizons = {"short sliding": "1x8+1x16+1x0", "sliding": "1x32+1x16+1x0"}.get(name, "1x32+1x8+1x0")
    own: dict = {"rule": "sliding" if "sliding" in name else "boundary", "memory_block": 8}
    if name == "grouped and gated":
        own |= {"num_kv_heads": 1, "memory_gate": -0.5}
    return RecurrentTransformer(392, horizons, T, **SIZES, **own, **changes).double().eval()


def generator(name: str, **changes: object) -> Generator:
    return Generator(network(name, **changes), build_tokenizer(TokenizerSpec()))


def prompt(length: int) -> list[int]:
    return torch.randint(4, 392, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def token_by_token(backbone: Backbone, ids: list[int]) -> tuple[Tensor, Memory]:
    memory = backbone.init_memory(1, decoding=True)
    for token in ids:
        logits_BTV, update = backbone(torch.tensor([[token]]), memory)
        memory.commit(update)
    return logits_BTV[:, -1], memory


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[int, ...]]]:
    """Let `auto` be FlexAttention, as on CUDA; holds the shapes of all its calls."""
    shapes: set[tuple[int, ...]] = set()

    def recorded(
        query: Tensor, key: Tensor, value: Tensor, past: object, visibility: Visibility, *gate: object
    ) -> Tensor:
        sizes = visibility.num_open, visibility.num_queries, len(visibility.ages_M)
        shapes.add((len(query), *sizes, visibility.rule.__name__))
        return flex(query, key, value, past, visibility, *gate)  # type: ignore[arg-type]

    monkeypatch.setitem(attention_module.IMPLEMENTATIONS, "flex", Implementation(recorded, is_compiled=True))
    monkeypatch.setitem(attention_module._selected, ("auto", "cpu"), "flex")
    own_blocks.cache_clear()
    yield shapes
    own_blocks.cache_clear()


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_logits_and_memory_are_those_of_every_other_way_to_read(name: str, seen: set[tuple[int, ...]]) -> None:
    made, plain = generator(name), generator(name, attention="merged")
    assert made.backbone.compiles_each_length
    assert not plain.backbone.compiles_each_length
    for length in AROUND_BOUNDARIES:
        ids = prompt(length)
        logits_BV, memory = made.prefill(ids)
        wanted_BV, other = plain.prefill(ids)  # the last segment as short as it is
        torch.testing.assert_close(logits_BV, wanted_BV, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(logits_BV, token_by_token(plain.backbone, ids)[0], rtol=1e-9, atol=1e-10)
        assert (memory.clock, memory.open_length) == (other.clock, other.open_length) == (length // T * T, length % T)
        following = torch.tensor(prompt(T - length % T)[:3])
        for token in following:  # goes on from the same state
            step_BTV, update = made.backbone(token.view(1, 1), memory)
            memory.commit(update)
            wanted_BTV, other_update = plain.backbone(token.view(1, 1), other)
            other.commit(other_update)
            torch.testing.assert_close(step_BTV, wanted_BTV, rtol=1e-9, atol=1e-10)
    assert seen


@pytest.mark.parametrize(("name", "num_shapes"), [("boundary", 3), ("sliding", 3), ("perceiver", 2)])
@torch.no_grad()
def test_prompts_of_all_lengths_have_one_shape_for_each_horizon(
    name: str, num_shapes: int, seen: set[tuple[int, ...]]
) -> None:
    made = generator(name)
    for length in range(1, 3 * T + 1):
        made.prefill(prompt(length))
    assert {(lanes, opened, queries) for lanes, opened, queries, _, _ in seen} == {(1, 0, T)}
    assert len(seen) == num_shapes
    windows = {window for *_, slots, window in seen if slots}
    assert own_blocks.cache_info().currsize == len(windows)


@torch.no_grad()
def test_what_is_not_compiled_reads_no_more_tokens_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    made, read = generator("boundary"), []
    original = made.backbone.forward
    monkeypatch.setattr(made.backbone, "forward", lambda ids, *rest: read.append(ids.shape[1]) or original(ids, *rest))
    made.prefill(prompt(2 * T + 3))
    assert read == [T, T, 3]


@torch.no_grad()
def test_the_first_tokens_of_a_pass_are_a_pass_of_their_own() -> None:
    for name in NETWORKS:
        backbone, ids = network(name), torch.tensor([prompt(T)])
        memory = backbone.init_memory(1, decoding=True)
        for count in (1, 5, T - 1, T):
            cut, alone = backbone(ids, memory)[1].first(count), backbone(ids[:, :count], memory)[1]
            assert cut.num_tokens == alone.num_tokens == count
            for mine, wanted in zip((*cut.keys, *cut.values), (*alone.keys, *alone.values), strict=True):
                torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-10)


def test_layers_that_are_compiled_read_one_length_and_a_twin_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for compiled in (True, "together"):
        backbone = network("boundary", compile_blocks=compiled)
        assert backbone.compiles_each_length
        assert not evaluation_copy(backbone).compiles_each_length


def test_a_twin_shares_weights_and_leaves_activations_out() -> None:
    backbone = tiny_transformer()
    backbone.kept = backbone.embedding.weight * 2  # type: ignore[assignment]
    made = evaluation_copy(backbone)
    assert made.embedding.weight is backbone.embedding.weight
    assert not made.kept.requires_grad
    assert not made.training
