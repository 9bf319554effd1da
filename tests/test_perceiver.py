"""Theorems about the Perceiver-AR-like baseline. B lanes, T segment, P prefix, V vocabulary."""

import copy
from functools import partial

import pytest
import torch

from conftest import tiny_transformer
from dsmr import UserError
from dsmr.model import PerceiverAR, RecurrentTransformer
from dsmr.share.description import check_same_network, describe_network
from dsmr.training.module import build_backbone
from test_memory import boundary_mask, one_pass, random_tokens, stream

PREFIXES = [1, 5, 8, 20, 200]


def tiny_perceiver(prefix_length: int = 20, **changes: object) -> PerceiverAR:
    """A float64 network of width 16 with the weights of `tiny_transformer`."""
    torch.manual_seed(0)
    sizes: dict = {"d_model": 16, "num_layers": 3, "num_heads": 2, "dropout": 0.0, "init_std": 0.4} | changes
    return PerceiverAR(11, 8, prefix_length=prefix_length, **sizes).double().eval()


@pytest.mark.parametrize("prefix_length", PREFIXES)
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_streamed_equals_its_definition_in_one_pass(prefix_length: int, num_kv_heads: int) -> None:
    model = tiny_perceiver(prefix_length, num_kv_heads=num_kv_heads)
    tokens_BN = random_tokens(2, 88)
    masks = [boundary_mask(88, 8, prefix_length), boundary_mask(88, 8, 0), boundary_mask(88, 8, 0)]
    torch.testing.assert_close(stream(model, tokens_BN), one_pass(model, tokens_BN, masks), atol=1e-10, rtol=0)


def test_it_computes_what_one_long_horizon_at_the_bottom_computes_with_as_many_parameters() -> None:
    model, recurrent = tiny_perceiver(24), tiny_transformer("1x24+2x0")
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in recurrent.state_dict().items()
    }
    recurrent.load_state_dict(model.state_dict())
    tokens_BN = random_tokens(2, 80)
    torch.testing.assert_close(stream(model, tokens_BN), stream(recurrent, tokens_BN), atol=1e-10, rtol=0)


@pytest.mark.parametrize("prefix_length", PREFIXES)
@pytest.mark.parametrize("parts", [[1] * 8, [8], [3, 5], [1, 2, 5]])
def test_token_by_token_equals_segment_by_segment(prefix_length: int, parts: list[int]) -> None:
    model = tiny_perceiver(prefix_length)
    tokens_BN = random_tokens(2, 56)
    memory = model.init_memory(2, decoding=True)
    logits = []
    for part_BT in tokens_BN.split(parts * 7, dim=1):
        out_BTV, update = model(part_BT, memory)
        memory.commit(update)
        logits.append(out_BTV)
    torch.testing.assert_close(torch.cat(logits, dim=1), stream(model, tokens_BN), atol=1e-10, rtol=0)


def test_lanes_that_begin_at_different_times_equal_each_piece_alone() -> None:
    model = tiny_perceiver(20)
    first, second, whole = random_tokens(1, 32, 2), random_tokens(1, 24, 3), random_tokens(1, 56, 4)
    joined_BN = torch.cat([torch.cat([first, second], dim=1), whole])
    memory = model.init_memory(2)
    logits = []
    for number, segment_BT in enumerate(joined_BN.split(8, dim=1)):
        out_BTV, update = model(segment_BT, memory, torch.tensor([number in (0, 4), number == 0]))
        memory.commit(update)
        logits.append(out_BTV)
    alone = [torch.cat([stream(model, first), stream(model, second)], dim=1), stream(model, whole)]
    torch.testing.assert_close(torch.cat(logits, dim=1), torch.cat(alone), atol=1e-10, rtol=0)


def test_gradients_reach_the_embeddings_of_the_prefix_as_long_as_it_holds_them() -> None:
    model = tiny_perceiver(8)
    memory = model.init_memory(1)
    memory.commit(model(torch.zeros(1, 8, dtype=torch.long), memory)[1])
    logits_BTV, _ = model(torch.ones(1, 8, dtype=torch.long), memory)
    (gradient,) = torch.autograd.grad(logits_BTV[..., 1].sum(), [model.embedding.weight])
    assert gradient[0].any(), "token 0 stands in the prefix alone"
    memory.commit(model(torch.full((1, 8), 2), memory)[1])
    logits_BTV, _ = model(torch.ones(1, 8, dtype=torch.long), memory)
    (gradient,) = torch.autograd.grad(logits_BTV[..., 1].sum(), [model.embedding.weight])
    assert not gradient[0].any(), "it has left the prefix"


@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_bytes_equal_the_formula_and_do_not_grow(decoding: bool, num_kv_heads: int) -> None:
    model = tiny_perceiver(20, num_kv_heads=num_kv_heads).float()
    memory = model.init_memory(3, decoding=decoding)
    expected = 8 * 3 * 28 + (2 * 4 * 3 * 8 * num_kv_heads * (20 + 3 * 8) if decoding else 0)
    assert memory.num_bytes == model.state_bytes(3, 4, decoding=decoding) == expected
    for segment_BT in random_tokens(3, 64).split([3, 5] * 8 if decoding else 8, dim=1):
        memory.commit(model(segment_BT, memory)[1])
    assert memory.num_bytes == expected


@pytest.mark.parametrize("decoding", [False, True])
def test_forward_changes_nothing_and_a_saved_memory_continues_exactly(decoding: bool) -> None:
    model = tiny_perceiver(20)
    memory = model.init_memory(2, decoding=decoding)
    for segment_BT in random_tokens(2, 27 if decoding else 32).split(8, dim=1):
        memory.commit(model(segment_BT, memory)[1])
    before = copy.deepcopy(memory.state_dict())
    tokens_BT = random_tokens(2, 5 if decoding else 8, seed=9)
    logits_BTV, _ = model(tokens_BT, memory)
    for name, value in before.items():
        torch.testing.assert_close(memory.state_dict()[name], value, atol=0, rtol=0)
    restored = model.init_memory(2, decoding=decoding)
    restored.load_state_dict(before)
    assert torch.equal(model(tokens_BT, restored)[0], logits_BTV)
    with pytest.raises(ValueError, match="prefix_length"):
        tiny_perceiver(24).init_memory(2, decoding=decoding).load_state_dict(before)


def test_its_config_rebuilds_it_and_it_says_what_it_remembers() -> None:
    model = tiny_perceiver(20)
    again = PerceiverAR(**model.config()).double().eval()
    again.load_state_dict(model.state_dict())
    tokens_BN = random_tokens(1, 40)
    assert torch.equal(stream(model, tokens_BN), stream(again, tokens_BN))
    assert "prefix of 20 token ids" in repr(model)


def test_what_it_cannot_do_is_refused_with_what_would_be_legal() -> None:
    perceiver = partial(PerceiverAR, d_model=16, num_layers=3, num_heads=2)
    with pytest.raises(UserError, match=r"no horizons; set model\.horizons to null"):
        build_backbone(perceiver, 11, 8, "3x8")
    with pytest.raises(ValueError, match="prefix_length is 0"):
        tiny_perceiver(0)
    with pytest.raises(UserError, match="needs horizons"):
        build_backbone(partial(RecurrentTransformer, d_model=16, num_layers=3, num_heads=2), 11, 8, None)
    assert build_backbone(perceiver, 11, 8, None).horizons == ()


def test_the_parameters_at_base_size_are_those_of_the_recurrent_transformer() -> None:
    with torch.device("meta"):
        networks = PerceiverAR(392, 512), RecurrentTransformer(392, "2x3584+10x512", 512)
    first, second = (sum(p.numel() for p in network.parameters()) for network in networks)
    assert first == second


def test_a_checkpoint_of_an_earlier_version_has_horizons_of_none() -> None:
    model = tiny_perceiver(20)
    earlier = model.config() | {"horizons": None}
    again = PerceiverAR.rebuild(earlier, attention="reference")
    assert again.config() == model.config()
    assert again.settings.attention == "reference"
    saved, present = ({**describe_network(model, None), "config": config} for config in (earlier, model.config()))
    check_same_network(saved, present, horizons_too=True)
    with pytest.raises(UserError, match="prefix_length = 20, now it is 8"):
        check_same_network(saved, describe_network(tiny_perceiver(8), None), horizons_too=True)
