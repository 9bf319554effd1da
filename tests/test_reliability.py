"""Checkpoints of earlier versions, and independence of a token from other pieces and lanes."""

import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import tiny_transformer
from dsmr.attention import backends as attention
from dsmr.attention.backends import Backend
from dsmr.batch import IGNORED
from dsmr.cli import main
from dsmr.cli.lightning_cli import QUIET
from dsmr.data.lanes import LaneReader, plan_stream
from dsmr.data.store import Piece
from dsmr.model import Backbone
from dsmr.results.run_files import FORMAT_VERSION, read_checkpoint
from dsmr.share.loading import load_model
from dsmr.training.losses import token_nll
from test_perceiver import tiny_perceiver

# flex runs here as it is, which is slow but exact
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
VERSION_1 = Path(__file__).parent / "data" / "version1"


@pytest.fixture(autouse=True)
def lightnings_own_warnings() -> None:
    """Keep the program's own filters inside a test."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_token_depends_on_another_piece_or_lane(data: st.DataObject) -> None:
    check_mix(data)


@pytest.mark.slow
@settings(deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_token_depends_on_another_piece_or_lane_in_1000_mixes(data: st.DataObject) -> None:
    check_mix(data)


def check_mix(data: st.DataObject) -> None:
    """NLL of every token of a random mix is that of its piece alone, whatever else is read beside and before it."""
    lengths = data.draw(st.lists(st.integers(3, 60), min_size=1, max_size=7), label="lengths")
    num_lanes = data.draw(st.integers(1, 4), label="lanes")
    rule: str = data.draw(st.sampled_from(["boundary", "sliding"]), label="rule")
    form: Backend = data.draw(st.sampled_from(["reference", "merged", "materialised", "flex"]), label="form")
    horizons = data.draw(st.lists(st.integers(0, 6).map(lambda n: 4 * n), min_size=3, max_size=3), label="horizons")
    segment_length = data.draw(st.sampled_from([4, 8]), label="T")
    seed = data.draw(st.integers(0, 2**31), label="seed")
    if data.draw(st.booleans(), label="perceiver"):
        model: Backbone = tiny_perceiver(data.draw(st.integers(1, 20), label="prefix"))
        segment_length = 8
    else:
        spelling = "+".join(f"1x{tokens}" for tokens in horizons)
        model = tiny_transformer(spelling, segment_length, rule=rule, attention=form)
    store = pieces_at_random(lengths, seed)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(attention._selected, ("flex", "cpu"), "flex")
        mixed = nll_by_place(model, store, list(range(len(lengths))), num_lanes, segment_length, seed)
        for number, length in enumerate(lengths):
            alone = nll_by_place(model, store, [number], 1, segment_length, seed)
            places = [(number, position) for position in range(1, length)]
            assert sorted(alone) == places
            for place in places:
                assert mixed[place] == pytest.approx(alone[place], abs=1e-9), place
    assert len(mixed) == sum(length - 1 for length in lengths)


def pieces_at_random(lengths: list[int], seed: int) -> Any:
    """What a lane reader needs of a store."""
    tokens = np.random.default_rng(seed).integers(0, 11, sum(lengths)).astype(np.uint16)
    starts = np.cumsum([0, *lengths[:-1]])
    pieces = [
        Piece(str(number), "train", int(start), length, 1, 1.0, 60, 60)
        for number, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    return SimpleNamespace(tokens=tokens, pieces=pieces, marks=None)


def nll_by_place(
    model: Backbone, store: Any, numbers: list[int], num_lanes: int, segment_length: int, seed: int
) -> dict[tuple[int, int], float]:
    """NLL of every predicted token by (piece, position), over an epoch of some of the pieces in lanes."""
    lengths = [store.pieces[number].length for number in numbers]
    plan = plan_stream(numbers, lengths, segment_length=segment_length, num_lanes=num_lanes, seed=seed, epoch=0)
    reader, memory, found = LaneReader(store, segment_length), model.init_memory(num_lanes), {}
    for step in range(plan.num_steps):
        batch = reader.read_segment(plan, step, slice(0, num_lanes), 0)
        logits_BTV, update = model(batch.tokens_BT, memory, batch.is_start_B)
        memory.commit(update)
        nll_BT = token_nll(logits_BTV, batch.targets_BT)
        for lane, piece in enumerate(batch.piece_B.tolist()):
            for place in range(int((batch.targets_BT[lane] != IGNORED).sum())):
                found[piece, int(batch.position_B[lane]) + place] = float(nll_BT[lane, place])
    return found


def test_a_version_1_checkpoint_gives_its_recorded_logits() -> None:
    """Of tokens (7 * i) % 392 in two lanes of two segments, every eighth position; recorded by version 0.1.0."""
    loaded = load_model(VERSION_1)
    assert read_checkpoint(loaded.path)["dsmr"]["format_version"] == 1
    assert loaded.tokenizer == {"name": "performance", "config": {}}
    tokens_BT = (torch.arange(2 * 64) * 7 % 392).view(2, 64)
    memory, is_start_B = loaded.backbone.init_memory(2), torch.ones(2, dtype=torch.bool)
    logits = []
    with torch.no_grad():
        for segment_BT in tokens_BT.split(32, dim=1):
            logits_BTV, update = loaded.backbone(segment_BT, memory, is_start_B)
            memory.commit(update)
            logits.append(logits_BTV)
            is_start_B = torch.zeros(2, dtype=torch.bool)
    recorded = torch.from_numpy(np.load(VERSION_1 / "logits.npy"))
    torch.testing.assert_close(torch.cat(logits, dim=1)[:, ::8], recorded, atol=1e-5, rtol=1e-5)


def test_a_version_1_run_goes_on(tmp_path: Path) -> None:
    run = shutil.copytree(VERSION_1, tmp_path / "version1")
    before = (run / "metrics.csv").read_text().splitlines()
    assert main(["fit", "--resume", str(run), "--trainer.max_steps", "16"]) == 0
    after = read_checkpoint(run / "last.ckpt")
    assert (after["global_step"], after["dsmr"]["format_version"]) == (16, FORMAT_VERSION)
    assert len((run / "metrics.csv").read_text().splitlines()) == len(before) + 4
