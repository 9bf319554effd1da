"""Theorems about the recurrent Transformer and its memory. B lanes, T segment, V vocabulary."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from conftest import ALL_RULES, tiny_transformer
from dsmr.attention.visibility import earliest_position, receptive_field
from dsmr.model import Memory, RecurrentTransformer
from dsmr.model.memory import open_bytes, ring_bytes
from dsmr.model.rotary import Rotation

HORIZONS = ["1x16+1x4+1x0", "3x8", "3x0", "1x32+2x8", "1x0+1x12+1x20"]


def random_tokens(num_lanes: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 11, (num_lanes, length), generator=torch.Generator().manual_seed(seed))


def stream(model: RecurrentTransformer, tokens_BN: Tensor, starts: set[int] = frozenset()) -> Tensor:
    """Logits (B, N, V), segment by segment; every lane begins anew at the segments `starts`."""
    memory = model.init_memory(len(tokens_BN))
    logits = []
    for number, segment_BT in enumerate(tokens_BN.split(model.segment_length, dim=1)):
        is_start_B = torch.full((len(tokens_BN),), number in starts)
        out_BTV, update = model(segment_BT, memory, is_start_B)
        memory.commit(update)
        logits.append(out_BTV)
    return torch.cat(logits, dim=1)


def one_pass(model: RecurrentTransformer, tokens_BN: Tensor, masks: list[Tensor]) -> Tensor:
    """The same function written out plainly: one pass over a whole piece with a mask per layer, (N, N)."""
    length = tokens_BN.shape[1]
    rotation = Rotation.at(0, length, model.settings.head_width, like=model.embedding.weight)
    x_BNE = model.embedding(tokens_BN)
    for block, mask_NN in zip(model.blocks, masks, strict=True):
        parts = block.query_key_value(block.attention_norm(x_BNE)).split(block.widths, dim=-1)
        query, key, value = (p.unflatten(-1, (-1, model.settings.head_width)).transpose(1, 2) for p in parts)
        groups = query.shape[1] // key.shape[1]
        key, value = rotation(key).repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = rotation(query) @ key.transpose(-1, -2) / model.settings.head_width**0.5
        weights = scores.masked_fill(~mask_NN, -torch.inf).softmax(dim=-1)
        x_BNE = x_BNE + block.output((weights @ value).transpose(1, 2).flatten(2))
        gate, up = block.gate_up(block.mlp_norm(x_BNE)).chunk(2, dim=-1)
        x_BNE = x_BNE + block.down(F.silu(gate) * up)
    return F.linear(model.norm(x_BNE), model.embedding.weight)


def boundary_mask(length: int, segment_length: int, horizon: int) -> Tensor:
    """Own segment up to itself, and `horizon` tokens before the segment."""
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    return (key <= query) & (key >= query // segment_length * segment_length - horizon)


def sliding_mask(length: int, segment_length: int, horizon: int) -> Tensor:
    """The `horizon` tokens that end with the query itself; its own segment where the horizon is 0."""
    if not horizon:
        return boundary_mask(length, segment_length, 0)
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    return (key <= query) & (key > query - horizon)


def quarter_mask(length: int, segment_length: int, horizon: int) -> Tensor:
    """Own segment, and `horizon` tokens before it but for the oldest quarter of them."""
    return boundary_mask(length, segment_length, horizon - horizon // 4)


MASKS = {"boundary": boundary_mask, "sliding": sliding_mask, "not_the_oldest_quarter": quarter_mask}


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("horizons", HORIZONS)
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_streamed_equals_one_pass_under_the_same_rule(horizons: str, num_kv_heads: int, rule: str) -> None:
    model = tiny_transformer(horizons, num_kv_heads=num_kv_heads, rule=rule)
    tokens_BN = random_tokens(2, 72)
    masks = [MASKS[rule](72, 8, horizon) for horizon in model.horizons]
    torch.testing.assert_close(stream(model, tokens_BN), one_pass(model, tokens_BN, masks), atol=1e-10, rtol=0)


@pytest.mark.parametrize("horizons", ["3x64", "1x64+1x96+1x512"])
@pytest.mark.parametrize("rule", ["boundary", "sliding"])
def test_streamed_equals_plain_causal_attention_when_the_horizons_cover_the_piece(horizons: str, rule: str) -> None:
    model = tiny_transformer(horizons, rule=rule)
    tokens_BN = random_tokens(2, 64)
    causal = [torch.ones(64, 64, dtype=torch.bool).tril()] * 3
    torch.testing.assert_close(stream(model, tokens_BN), one_pass(model, tokens_BN, causal), atol=1e-10, rtol=0)


def test_sliding_does_not_depend_on_the_segments_when_every_layer_remembers() -> None:
    tokens_BN = random_tokens(2, 96)
    results = [
        stream(tiny_transformer("1x16+1x48+1x24", length, rule="sliding"), tokens_BN) for length in (4, 8, 16, 32)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-10, rtol=0)
    boundary = [stream(tiny_transformer("1x16+1x48+1x24", length), tokens_BN) for length in (8, 16)]
    assert not torch.allclose(*boundary), "under `boundary` the segments matter"


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("horizons", HORIZONS)
@pytest.mark.parametrize("parts", [[1] * 8, [8], [3, 5], [1, 2, 5]])
def test_token_by_token_equals_segment_by_segment(horizons: str, parts: list[int], rule: str) -> None:
    model = tiny_transformer(horizons, rule=rule)
    tokens_BN = random_tokens(2, 56)
    memory = model.init_memory(2, decoding=True)
    logits = []
    for part_BT in tokens_BN.split(parts * 7, dim=1):
        out_BTV, update = model(part_BT, memory)
        memory.commit(update)
        logits.append(out_BTV)
    torch.testing.assert_close(torch.cat(logits, dim=1), stream(model, tokens_BN), atol=1e-10, rtol=0)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_lanes_that_begin_at_different_times_equal_each_piece_alone(rule: str) -> None:
    model = tiny_transformer("1x16+1x4+1x12", rule=rule)
    pieces = [random_tokens(1, 8 * length, seed) for seed, length in enumerate([5, 3, 6, 2, 4, 4])]
    lanes = [[0, 1], [2, 3], [4, 5]]
    joined_BN = torch.cat([torch.cat([pieces[p] for p in lane], dim=1) for lane in lanes])
    starts = [[sum(pieces[p].shape[1] for p in lane[:k]) // 8 for k in range(len(lane))] for lane in lanes]
    memory = model.init_memory(3)
    logits = []
    for number, segment_BT in enumerate(joined_BN.split(8, dim=1)):
        out_BTV, update = model(segment_BT, memory, torch.tensor([number in lane for lane in starts]))
        memory.commit(update)
        logits.append(out_BTV)
    alone_BNV = torch.cat([torch.cat([stream(model, pieces[p]) for p in lane], dim=1) for lane in lanes])
    torch.testing.assert_close(torch.cat(logits, dim=1), alone_BNV, atol=1e-10, rtol=0)


def reach(start: int, segment_length: int, horizons: tuple[int, ...], rule: str) -> int:
    """Earliest position whose token a query can depend on, from the top layer down."""
    for horizon in reversed(horizons):
        before = horizon - horizon // 4 if rule == "not_the_oldest_quarter" else horizon
        is_window = rule == "sliding" and horizon
        start = start - (horizon - 1) if is_window else start // segment_length * segment_length - before
    return start


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("horizons", ["1x16+1x4+1x0", "1x0+1x8+1x4", "3x4"])
def test_a_changed_token_changes_just_the_positions_that_the_horizons_allow(horizons: str, rule: str) -> None:
    model = tiny_transformer(horizons, rule=rule)
    tokens_BN = random_tokens(2, 80)
    before_BNV = stream(model, tokens_BN)
    for place in (3, 21, 40):
        changed_BN = tokens_BN.clone()
        changed_BN[0, place] = (changed_BN[0, place] + 1) % 11
        differs_BN = (stream(model, changed_BN) != before_BNV).any(dim=-1)
        reached = [place <= i and reach(i, 8, model.horizons, rule) <= place for i in range(80)]
        assert differs_BN[0].tolist() == reached
        assert reached == [place <= i and earliest_position(i, model.horizons, 8, rule) <= place for i in range(80)]
        assert not differs_BN[1].any(), "another lane"
    assert receptive_field(model.horizons, 8, rule)[-1] == 72 - reach(72, 8, model.horizons, rule)


def test_a_changed_token_never_reaches_the_next_piece() -> None:
    model = tiny_transformer("3x32")
    tokens_BN = random_tokens(1, 64)
    changed_BN = tokens_BN.clone()
    changed_BN[:, :32] = (changed_BN[:, :32] + 1) % 11
    before, after = (stream(model, t, starts={0, 4}) for t in (tokens_BN, changed_BN))
    assert (before[:, :32] != after[:, :32]).any()
    assert torch.equal(before[:, 32:], after[:, 32:])


def test_gradients_stop_at_the_segments_start() -> None:
    model = tiny_transformer("3x16")
    memory = model.init_memory(1)
    read: list[Tensor] = []
    model.embedding.register_forward_hook(lambda _module, _tokens, out: read.append(out))
    first_BTV, update = model(random_tokens(1, 8), memory)
    assert not any(tensor.requires_grad for tensor in (*update.keys, *update.values))
    memory.commit(update)
    second_BTV, _ = model(random_tokens(1, 8, seed=2), memory)
    gradients = torch.autograd.grad(second_BTV.sum(), read, allow_unused=True)
    assert gradients[0] is None, "a gradient reaches the segment before"
    assert gradients[1] is not None
    (gradient,) = torch.autograd.grad(first_BTV[0, 5].sum(), read[:1])
    assert [bool(row.any()) for row in gradient[0]] == [True] * 6 + [False] * 2, "the future"


@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_bytes_equal_the_formula(decoding: bool, num_kv_heads: int) -> None:
    model = tiny_transformer("1x16+1x4+1x0", num_kv_heads=num_kv_heads).float()
    sizes = {"num_lanes": 3, "kv_width": 8 * num_kv_heads, "itemsize": 4}
    expected = ring_bytes(model.horizons, **sizes)
    if decoding:
        expected += open_bytes(3, segment_length=8, **sizes)
    memory = model.init_memory(3, decoding=decoding)
    assert memory.num_bytes == expected
    for segment_BT in random_tokens(3, 64).split(8, dim=1):
        memory.commit(model(segment_BT, memory)[1])
    assert memory.num_bytes == expected, "memory grew"


def test_equal_budgets_are_equal_in_bytes() -> None:
    schedules = ["3x8", "1x24+2x0", "1x4+1x8+1x12", "1x12+1x8+1x4", "2x4+1x16"]
    sizes = {
        sum(t.untyped_storage().nbytes() for t in (*memory.keys, *memory.values))
        for memory in (tiny_transformer(text).init_memory(3) for text in schedules)
    }
    assert sizes == {2 * 8 * 3 * 16 * 24}


def test_memory_is_in_the_compute_precision_under_autocast() -> None:
    model = tiny_transformer().float()
    with torch.autocast("cpu", torch.bfloat16):
        memory = model.init_memory(2)
        memory.commit(model(random_tokens(2, 8), memory)[1])
    assert memory.dtype == torch.bfloat16


@pytest.mark.parametrize("decoding", [False, True])
def test_forward_changes_nothing_that_it_was_given(decoding: bool) -> None:
    model = tiny_transformer()
    memory = model.init_memory(2, decoding=decoding)
    for segment_BT in random_tokens(2, 24).split(8, dim=1):
        memory.commit(model(segment_BT, memory)[1])
    if decoding:
        memory.commit(model(random_tokens(2, 3), memory)[1])
    tokens_BT, is_start_B = random_tokens(2, 5 if decoding else 8, seed=3), torch.tensor([False, False])
    before, tokens_before = copy.deepcopy(memory.state_dict()), tokens_BT.clone()
    model(tokens_BT, memory, None if decoding else is_start_B)
    assert_same(before, memory.state_dict())
    assert torch.equal(tokens_BT, tokens_before)
    assert not is_start_B.any()


def assert_same(first: dict, second: dict) -> None:
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=0, rtol=0)


def test_an_emptied_slot_gets_no_attention_weight_whatever_it_holds() -> None:
    model = tiny_transformer("3x16")
    memory = model.init_memory(1)
    memory.commit(model(random_tokens(1, 8), memory)[1])
    start = torch.tensor([True])
    clean_BTV, _ = model(random_tokens(1, 8, seed=5), memory, start)
    for tensor in (*memory.keys, *memory.values):
        tensor.fill_(1e6)
    dirty_BTV, _ = model(random_tokens(1, 8, seed=5), memory, start)
    assert torch.equal(clean_BTV, dirty_BTV)


def test_a_saved_memory_continues_exactly() -> None:
    model = tiny_transformer()
    memory = model.init_memory(2)
    for segment_BT in random_tokens(2, 40).split(8, dim=1):
        memory.commit(model(segment_BT, memory)[1])
    restored = model.init_memory(2)
    restored.load_state_dict(copy.deepcopy(memory.state_dict()))
    tokens_BT = random_tokens(2, 8, seed=9)
    assert torch.equal(model(tokens_BT, memory)[0], model(tokens_BT, restored)[0])


def test_a_saved_memory_of_other_horizons_is_refused() -> None:
    saved = tiny_transformer("3x8").init_memory(2).state_dict()
    with pytest.raises(ValueError, match="horizons"):
        tiny_transformer("3x16").init_memory(2).load_state_dict(saved)


def test_the_clock_keeps_its_precision_at_a_million_tokens() -> None:
    model = tiny_transformer("3x16")
    early, late = model.init_memory(1), model.init_memory(1)
    late.clock = 2**20
    for segment_BT in random_tokens(1, 32).split(8, dim=1):
        (first, update_first), (second, update_second) = (model(segment_BT, m) for m in (early, late))
        early.commit(update_first)
        late.commit(update_second)
    torch.testing.assert_close(first, second, atol=1e-7, rtol=0)


def test_a_piece_cannot_begin_inside_a_segment_nor_a_pass_cross_its_end() -> None:
    model = tiny_transformer()
    memory = model.init_memory(1, decoding=True)
    memory.commit(model(random_tokens(1, 3), memory)[1])
    with pytest.raises(ValueError, match="segment's start"):
        model(random_tokens(1, 1), memory, torch.tensor([True]))
    with pytest.raises(ValueError, match="room for 1 to 5"):
        model(random_tokens(1, 6), memory)
    memory = model.init_memory(1)
    update = model(random_tokens(1, 3), memory)[1]
    with pytest.raises(ValueError, match="decoding=True"):
        memory.commit(update)


def test_the_networks_config_rebuilds_it() -> None:
    model = tiny_transformer()
    again = RecurrentTransformer(**model.config()).double().eval()
    again.load_state_dict(model.state_dict())
    tokens_BN = random_tokens(1, 16)
    assert torch.equal(stream(model, tokens_BN), stream(again, tokens_BN))


def test_the_parameter_count_of_the_default_size() -> None:
    with torch.device("meta"):
        model = RecurrentTransformer(392, "2x3584+10x512", 512)
    per_layer = 4 * 512**2 + 3 * 512 * 1408 + 2 * 512
    assert sum(p.numel() for p in model.parameters()) == 392 * 512 + 12 * per_layer + 512


def test_memory_is_a_plain_object_that_no_network_holds() -> None:
    model = tiny_transformer()
    model.init_memory(2)
    assert not any(isinstance(value, Memory) for module in model.modules() for value in vars(module).values())
    assert not list(model.buffers())
