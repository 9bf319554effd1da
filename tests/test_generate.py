"""Generation: the same function as in training, only valid music, files that hold what was read and drawn."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from miditok import MusicTokenizer
from symusic import ControlChange, Note, Score, Tempo, Track
from torch import Tensor

from dsmr.data.folder import find_source
from dsmr.data.midi import read_midi
from dsmr.data.performance import Performance
from dsmr.data.tokenizer import TokenizerSpec, build_tokenizer, decode, encode
from dsmr.data.vocabulary import BOS, EOS, PAD
from dsmr.generate import Generator, Prompt, Sampling, compose_score
from dsmr.generate.continuations import continuations
from dsmr.generate.generator import make_grammar
from dsmr.generate.grammar import Grammar
from dsmr.generate.music import SEAM_MARKER, end_sounding_notes
from dsmr.generate.performance_grammar import PerformanceGrammar
from dsmr.generate.prompt import EMPTY_PROMPT, token_ticks
from dsmr.generate.sampling import normalize_within_kinds, sample_tokens
from dsmr.generate.score_time import seconds_to_ticks, ticks_to_seconds
from dsmr.model import Backbone, PerceiverAR, RecurrentTransformer
from test_tokenizer import ONE_STREAM

SIZES = {"d_model": 32, "num_heads": 2, "init_std": 0.3}
VARIANTS: dict[str, Callable[[], Backbone]] = {
    "full": lambda: recurrent("3x64"),
    "two-scale": lambda: recurrent("1x64+2x16"),
    "descending, grouped keys": lambda: recurrent("1x48+1x32+1x16", num_kv_heads=1),
    "binary": lambda: recurrent("1x0+1x64+1x0"),
    "memoryless": lambda: recurrent("3x0"),
    "sliding": lambda: recurrent("1x64+1x16+1x0", rule="sliding"),
    "perceiver": lambda: PerceiverAR(392, 16, prefix_length=48, num_layers=3, **SIZES),
}


def recurrent(horizons: str, **settings: object) -> RecurrentTransformer:
    return RecurrentTransformer(392, horizons, 16, num_layers=3, memory_block=16, **SIZES, **settings)  # type: ignore[arg-type]


@pytest.fixture
def tokenizer() -> Performance:
    made = build_tokenizer(TokenizerSpec())
    assert isinstance(made, Performance)
    return made


def generator(network: str = "two-scale", seed: int = 0, **sampling: float) -> Generator:
    torch.manual_seed(seed)
    backbone = VARIANTS[network]().double().eval()
    return Generator(backbone, build_tokenizer(TokenizerSpec()), Sampling(**{"top_p": 1.0, **sampling}))  # type: ignore[arg-type]


def drawn(
    made: Generator, count: int, prompt: Prompt = EMPTY_PROMPT, *, num: int = 1, seed: int = 0
) -> list[list[int]]:
    """Tokens of each lane."""
    steps = made.tokens(prompt, num=num, seed=seed, may_end=False)
    return [list(lane) for lane in zip(*islice(steps, count), strict=True)]


def score(*, seconds: float = 12.0, tpq: int = 480, bpm: float = 120.0, seed: int = 0, pedal: bool = True) -> Score:
    """Some music with pedals, a drum track and a string track."""
    made, draws, per_second = Score(tpq), np.random.default_rng(seed), tpq * bpm / 60
    made.tempos.append(Tempo(0, bpm))
    piano, strings, drums = Track("Grand", 0, False), Track("Strings", 48, False), Track("Drums", 0, True)
    for onset in np.sort(draws.uniform(0.3, seconds, int(4 * seconds))):
        length = draws.uniform(0.05, 1.5)
        note = (int(onset * per_second), max(1, int(length * per_second)), int(draws.integers(40, 80)))
        piano.notes.append(Note(*note, int(draws.integers(20, 110))))
    strings.notes.append(Note(0, tpq, 60, 60))
    drums.notes.append(Note(0, tpq, 36, 60))
    for down in np.arange(0.5, seconds, 2.0) if pedal else ():
        piano.controls.append(ControlChange(int(down * per_second), 64, 100))
        piano.controls.append(ControlChange(int((down + 1.4) * per_second), 64, 0))
    made.tracks.extend([piano, strings, drums])
    return Score.from_midi(made.dumps_midi())


# the same function as in training


@pytest.mark.parametrize("network", VARIANTS)
@pytest.mark.parametrize("num", [1, 3])
def test_token_by_token_logits_are_those_of_training(network: str, num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = generator(network), []
    original = made.backbone.forward

    def recorded(tokens_BT: Tensor, *given: object) -> tuple[Tensor, object]:
        logits_BTV, update = original(tokens_BT, *given)  # type: ignore[arg-type]
        seen.append(logits_BTV[:, -1].clone())
        return logits_BTV, update

    monkeypatch.setattr(made.backbone, "forward", recorded)
    prompt = Prompt([BOS, *drawn(generator(seed=1), 89)[0]])  # five segments and a part of one
    lanes = drawn(made, 70, prompt, num=num)
    reads = len(seen) - 69
    assert reads == 6, "the prompt is read segment by segment"
    monkeypatch.undo()
    for lane, tokens in enumerate(lanes):
        everything, memory, wanted = [*prompt.ids, *tokens], made.backbone.init_memory(1), []
        for first in range(0, len(everything) - 16, 16):
            part = torch.tensor([everything[first : first + 16]])
            with torch.no_grad():
                logits_BTV, update = made.backbone(part, memory)
            memory.commit(update)
            wanted.append(logits_BTV[0])
        whole = torch.cat(wanted)[len(prompt.ids) - 1 :]
        found = torch.stack([row[min(lane, len(row) - 1)] for row in seen[reads - 1 :]])[: len(whole)]
        torch.testing.assert_close(found, whole, rtol=1e-8, atol=1e-9)
    assert len({tuple(tokens) for tokens in lanes}) == num


def test_a_seed_gives_the_same_music_and_another_one_other_music() -> None:
    made = generator()
    first, again, other = (drawn(made, 200, seed=seed)[0] for seed in (5, 5, 6))
    assert first == again
    assert first != other


@pytest.mark.parametrize("network", VARIANTS)
def test_a_batch_gives_what_its_lanes_give_alone(network: str) -> None:
    made = generator(network)
    prompt = Prompt([BOS, *drawn(generator(seed=1), 37)[0]])
    batch = drawn(made, 120, prompt, num=3, seed=7)
    assert batch == [drawn(made, 120, prompt, seed=7 + lane)[0] for lane in range(3)]


# only valid music


@pytest.mark.parametrize("seed", [0, 1])
def test_what_random_weights_write_is_encoded_again_as_it_was(seed: int, tokenizer: Performance) -> None:
    for ids in drawn(generator(seed=seed), 3000, num=2):
        whole = end_sounding_notes(tokenizer, EMPTY_PROMPT, ids, int(token_ticks(tokenizer, ids)[-1]) + 3)
        assert len(whole) >= 2900
        for back in (
            decode(tokenizer, whole),
            read_midi(compose_score(tokenizer, EMPTY_PROMPT, whole).dumps_midi())[0],
        ):
            assert encode(tokenizer, back).ids[1:-1].tolist() == whole


def test_every_beginning_of_real_order_is_allowed(tokenizer: Performance) -> None:
    # the mask forbids nothing that the encoder writes
    pieces = [encode(tokenizer, score(seconds=40, seed=seed)).ids.tolist() for seed in range(3)]
    for ids in pieces:
        grammar = PerformanceGrammar(tokenizer)
        grammar.begin([BOS], 1)
        for id_ in ids[1:]:
            assert grammar.allowed(may_end=True)[0, id_], tokenizer[id_]
            grammar.advance(torch.tensor([id_]))


def test_the_mask_forbids_what_the_encoder_never_writes(tokenizer: Performance) -> None:
    on, off, velocity, shift = tokenizer.note_on, tokenizer.note_off, tokenizer.velocity, tokenizer.shift
    start = [BOS, velocity + 9, on + 60, on + 64]

    def allowed(*ids: int, first_tick: int = 0, may_end: bool = True) -> set[int]:
        grammar = PerformanceGrammar(tokenizer)
        grammar.begin(ids, 1, first_tick)
        return set(grammar.allowed(may_end=may_end)[0].nonzero()[:, 0].tolist())

    assert allowed(BOS) == {*range(shift, shift + 100), *range(velocity, velocity + 32)}
    now = allowed(*start)
    assert {on + 65, shift, velocity + 3} <= now
    assert not now & {on + 60, on + 62, off + 60, velocity + 9, PAD, BOS, EOS}  # sounds, lower, in its tick, the same
    later = allowed(*start, shift + 9)
    assert {off + 60, off + 64, on + 20, velocity + 8} <= later
    assert not later & {on + 60, off + 61, shift, shift + 99}  # sounds, silent, a shift after a part of a second
    assert shift in allowed(*start, shift + 99)
    assert allowed(*start, shift + 9, velocity + 8) == {on + p for p in range(128) if p not in (60, 64)}
    ended = allowed(*start, shift + 9, off + 64)
    assert not ended & {off + 60, EOS}  # lower in its tick, and sounding
    assert on + 64 in ended
    over = [*start, shift + 9, off + 60, off + 64]
    assert EOS in allowed(*over)
    assert EOS not in allowed(*over, may_end=False)
    assert EOS not in allowed(*over, shift)
    waiting = allowed(*over, first_tick=40)
    assert waiting == {*range(shift + 29, shift + 100)}  # from tick 10 to tick 40 or later
    assert allowed(*over, first_tick=200) == {shift + 99}


def test_a_prompt_is_taken_in_as_token_by_token(tokenizer: Performance) -> None:
    ids = drawn(generator(), 400)[0]
    for end in (1, 2, 57, 200, 399):
        quick, slow = PerformanceGrammar(tokenizer), PerformanceGrammar(tokenizer)
        quick.begin([BOS, *ids[:end]], 2)
        slow.begin([BOS], 2)
        for id_ in ids[:end]:
            slow.advance(torch.tensor([id_, id_]))
        for name in ("state_B4", "last_B"):
            assert torch.equal(getattr(quick, name), getattr(slow, name)), name
        assert quick.sounding(1) == slow.sounding(1)


def test_pieces_end_and_lanes_that_ended_are_silent(tokenizer: Performance) -> None:
    class Ending(Grammar):
        """Lets lanes do nothing but end: lane k after k tokens."""

        def begin(self, ids: object, num_lanes: int, first_tick: int = 0) -> None:
            self.tick_B, self.count = torch.zeros(num_lanes), 0

        def allowed(self, *, may_end: bool) -> Tensor:
            allowed_BV = torch.zeros(3, 392, dtype=torch.bool)
            for lane in range(3):
                allowed_BV[lane, EOS if self.count >= lane else tokenizer.shift] = True
            return allowed_BV

        def advance(self, tokens_B: Tensor) -> None:
            self.count += 1

    steps = list(generator().tokens(num=3, grammar=Ending()))
    shift = tokenizer.shift
    assert steps == [[EOS, shift, shift], [PAD, EOS, shift], [PAD, PAD, EOS]]


def other_generator(spec: TokenizerSpec) -> Generator:
    """Random weights over the tokens of another tokenizer."""
    tokenizer = build_tokenizer(spec)
    torch.manual_seed(0)
    backbone = RecurrentTransformer(len(tokenizer), "1x64+2x16", 16, num_layers=3, memory_block=16, **SIZES).eval()  # type: ignore[arg-type]
    return Generator(backbone, tokenizer, Sampling(top_p=1.0))


@pytest.mark.parametrize("name", ["REMI", "TSD", "MIDILike"])
def test_other_tokenizers_follow_their_own_graph(name: str) -> None:
    made = other_generator(TokenizerSpec(name))
    tokenizer = made.tokenizer
    (one,) = continuations(made, made.prompt(score(), 6.0), seconds=5.0)
    kinds = [tokenizer[id_].split("_")[0] for id_ in one.ids]
    graph = tokenizer.tokens_types_graph
    assert all(after in graph[before] for before, after in pairwise(kinds))
    notes = one.score.to("second").tracks[0].notes
    assert sum(note.time < 6 for note in notes) == sum(n.time < 6 for n in score().to("second").tracks[0].notes)
    with pytest.raises(ValueError, match="performance tokens only"):
        made.stream()


@pytest.mark.parametrize("name", [*ONE_STREAM, "BEAT"])
def test_other_tokenizers_allow_what_they_write_and_decode_what_is_drawn(name: str) -> None:
    tokenizer = build_tokenizer(ONE_STREAM.get(name, TokenizerSpec(name)))
    grammar = make_grammar(tokenizer)
    grammar.begin([BOS], 1)
    last = BOS
    for id_ in encode(tokenizer, score(seconds=20)).ids[1:].tolist():
        assert grammar.allowed(may_end=True)[0, id_], f"{tokenizer[id_]} after {tokenizer[last]}"
        grammar.advance(torch.tensor([id_]))
        last = id_
    draws = torch.Generator().manual_seed(0)
    for may_end in (True, False) * 5:
        grammar.begin([BOS], 1)
        ids = []
        while len(ids) < 150 and EOS not in ids[-1:]:
            token_B = torch.multinomial(grammar.allowed(may_end=may_end)[0].float(), 1, generator=draws)
            ids += token_B.tolist()
            grammar.advance(token_B)
        assert may_end or EOS not in ids
        assert min(ids) >= EOS
        assert len(decode(tokenizer, ids).tracks) <= 1


@pytest.mark.parametrize("name", [*ONE_STREAM, "BEAT"])
def test_other_tokenizers_continue_a_prompt(name: str) -> None:
    made = other_generator(ONE_STREAM.get(name, TokenizerSpec(name)))
    music = score(bpm=80.0)
    prompt = made.prompt(music)
    assert not {EOS, made.tokenizer.vocab.get("Track_End")} & set(prompt.ids)
    (one,) = continuations(made, prompt, seconds=2.0)
    found, given = (
        Counter((round(n.time, 3), n.pitch) for n in s.to("second").tracks[0].notes) for s in (one.score, music)
    )
    assert given <= found, "the prompt is in the file"
    assert all(time < prompt.seam + 2.0 for time, _ in found - given)


@pytest.mark.parametrize("bpm", [60.0, 120.0, 200.0])
@pytest.mark.parametrize("name", ["REMI", "TSD", "PerTok"])
def test_a_model_that_knows_a_piece_continues_it_in_time_at_any_tempo(
    name: str, bpm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, reached = other_generator(ONE_STREAM[name]), []
    music = score(seconds=30.0, bpm=bpm, pedal=False)
    prompt = made.prompt(music, 8.0)
    whole = encode(made.tokenizer, music).ids.tolist()
    assert whole[: len(prompt.ids)] == prompt.ids
    monkeypatch.setattr(made, "tokens", lambda *_, **__: ([id_] for id_ in whole[len(prompt.ids) :]))
    (one,) = continuations(made, prompt, seconds=12.0, progress=reached.append)
    grid = 60 / bpm / 8
    assert 20.0 - 1.0 < prompt.seam + one.seconds <= 20.0
    found, given = (
        np.sort([note.time for note in s.to("second").tracks[0].notes if note.time < 20.0 - grid])
        for s in (one.score, music)
    )
    assert abs(len(found) - len(given)) <= 2, "what falls onto one grid point is one note"
    assert np.abs(found[:, None] - given).min(axis=0).max() <= grid
    assert max(note.time + note.duration for note in one.score.to("second").tracks[0].notes) <= 20.001
    assert reached == sorted(reached)
    assert 0 < reached[0] < reached[-1] == 12.0
    steps = np.diff([0.0, *reached])
    assert steps.max() < 6.0, "64 tokens are a few seconds"


def test_progress_is_never_below_nothing_nor_above_the_goal(tokenizer: Performance) -> None:
    sparse = Score(480)
    sparse.tracks.append(Track("", 0, False))
    sparse.tracks[0].notes.extend([Note(0, 480, 60, 70), Note(480 * 400, 480, 62, 70)])  # at 0 and 200 s
    reached: list[float] = []
    for made, seam in ((generator(), 150.0), (other_generator(TokenizerSpec("REMI")), 150.0)):
        continuations(made, made.prompt(sparse, seam), seconds=0.3, num=3, progress=reached.append)
        assert reached[-1] <= 0.3 * 3
    assert min(reached) >= 0
    assert max(reached) == 0.3 * 3


def test_lanes_of_other_tokenizers_stop_where_each_alone_would() -> None:
    made = other_generator(TokenizerSpec("REMI"))
    prompt = made.prompt(score(), 6.0)
    together = continuations(made, prompt, seconds=3.0, num=3, seed=4)
    assert len({len(one.ids) for one in together}) == 3, "no lane went on for another one"
    for lane, one in enumerate(together):
        (alone,) = continuations(made, prompt, seconds=3.0, seed=4 + lane)
        assert alone.ids == one.ids
        assert alone.score.dumps_midi() == one.score.dumps_midi()
        assert alone.seconds == one.seconds


@pytest.mark.parametrize("spec", [TokenizerSpec("REMI"), TokenizerSpec("MMM", {"base_tokenizer": "TSD"})])
def test_other_tokenizers_end_their_pieces(spec: TokenizerSpec) -> None:
    made, reached = other_generator(spec), []
    pieces = continuations(made, seconds=3000.0, num=2, until_end=True, progress=reached.append)
    assert all(one.has_ended and one.ids[-1] == EOS for one in pieces)
    assert 0 < reached[-1] <= sum(one.seconds for one in pieces) < 6000.0


def test_seconds_of_a_file_are_the_inverse_of_its_ticks() -> None:
    music = score(bpm=93.0)
    music.tempos.extend([Tempo(1000, 60.0), Tempo(3000, 200.0)])
    ticks = np.asarray([0, 1, 999, 1000, 1001, 2999, 3000, 9000])
    assert seconds_to_ticks(music, ticks_to_seconds(music, ticks)).tolist() == ticks.tolist()
    notes = music.tracks[0].notes.numpy()["time"]
    assert ticks_to_seconds(music, notes) == pytest.approx(
        music.to("second").tracks[0].notes.numpy()["time"], abs=1e-4
    )


# sampling


def frequencies(logits: list[float], allowed: list[bool] | None = None, **settings: float) -> list[float]:
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5)[:, None] / 1000
    logits_BV = torch.tensor(logits, dtype=torch.float64).repeat(1000, 1)
    allowed_BV = torch.tensor(allowed or [True] * len(logits)).repeat(1000, 1)
    sampling = Sampling(**{"top_p": 1.0, **settings})  # type: ignore[arg-type]
    tokens_B = sample_tokens(logits_BV, allowed_BV, uniform, sampling)
    return (torch.bincount(tokens_B, minlength=len(logits)) / 1000).tolist()


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log().tolist()
    assert frequencies(logits) == pytest.approx([0.1, 0.5, 0.3, 0.1], abs=0.002)
    assert frequencies(logits, temperature=0.5) == pytest.approx([1 / 36, 25 / 36, 9 / 36, 1 / 36], abs=0.002)
    assert frequencies(logits, top_k=2) == pytest.approx([0, 5 / 8, 3 / 8, 0], abs=0.002)
    assert frequencies(logits, top_p=0.7) == pytest.approx([0, 5 / 8, 3 / 8, 0], abs=0.002)
    assert frequencies(logits, top_p=0.01) == [0, 1, 0, 0]
    assert frequencies(logits, min_p=0.55) == pytest.approx([0, 5 / 8, 3 / 8, 0], abs=0.002)
    assert frequencies(logits, min_p=1.0) == [0, 1, 0, 0]
    assert frequencies(logits, [True, False, True, False]) == pytest.approx([0.25, 0, 0.75, 0], abs=0.002)
    assert frequencies([0.0, 900.0, -900.0]) == [0, 1, 0]


def test_a_kind_keeps_its_probability_where_any_of_it_is_allowed() -> None:
    logits_BV = torch.tensor([[0.3, 0.1, 0.2, 0.15, 0.25]]).log()
    kinds_VK = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]])
    allowed_BV = torch.tensor([[False, True, True, True, True]])
    found = normalize_within_kinds(logits_BV, allowed_BV, kinds_VK)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.4, 0.2, 0.15, 0.25]]))
    nothing_left = normalize_within_kinds(logits_BV, torch.tensor([[False, False, True, False, True]]), kinds_VK)
    torch.testing.assert_close(nothing_left, torch.tensor([[0.0, 0.0, 0.35, 0.0, 0.25]]) / 0.6)
    extreme = normalize_within_kinds(torch.tensor([[500.0, -500.0, -600.0, 0.0, -900.0]]), allowed_BV, kinds_VK)
    assert extreme.isfinite().all()
    assert extreme.sum() == pytest.approx(1.0)
    none = normalize_within_kinds(logits_BV, torch.ones(1, 5, dtype=torch.bool), kinds_VK)
    torch.testing.assert_close(none, logits_BV.exp())


def test_long_notes_are_ended_and_the_order_is_kept(tokenizer: Performance) -> None:
    made = generator()
    made.max_note_seconds = 0.3
    for ids in drawn(made, 3000, num=2):
        whole = end_sounding_notes(tokenizer, EMPTY_PROMPT, ids, int(token_ticks(tokenizer, ids)[-1]) + 1)
        music = decode(tokenizer, whole)
        assert encode(tokenizer, music).ids[1:-1].tolist() == whole
        durations = np.sort(music.tracks[0].notes.numpy()["duration"])
        assert durations[-1] < 30 + 100, "a shift may pass over the moment"
    made.max_note_seconds = None
    (free,) = drawn(made, 3000)
    assert decode(tokenizer, free).tracks[0].notes.numpy()["duration"].max() > 130
    with pytest.raises(ValueError, match="max_note_seconds is 0"):
        Generator(made.backbone, tokenizer, max_note_seconds=0.0)


def test_the_ends_of_the_distribution_are_not_left() -> None:
    logits_BV = torch.zeros(2, 5)
    allowed_BV = torch.tensor([False, True, False, True, False]).repeat(2, 1)
    tokens_B = sample_tokens(logits_BV, allowed_BV, torch.tensor([[0.0], [1 - 2**-24]]), Sampling(top_p=1.0))
    assert set(tokens_B.tolist()) <= {1, 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 2.0}, "min_p is 2.0"),
    ],
)
def test_impossible_sampling_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


# prompts and files


def continued(
    music: Score, seconds: float | None, tokenizer: Performance, seed: int = 0
) -> tuple[Prompt, list[int], Score]:
    made = generator(seed=seed)
    prompt = made.prompt(music, seconds)
    (one,) = continuations(made, prompt, seconds=4.0, seed=seed)
    return prompt, one.ids, one.score


@pytest.mark.parametrize(("tpq", "bpm"), [(480, 120.0), (384, 120.0), (24, 60.0), (960, 171.3)])
@pytest.mark.parametrize("seconds", [None, 0.9, 5.0, 7.77])
def test_the_file_holds_what_was_read_and_what_was_drawn(
    seconds: float | None, tpq: int, bpm: float, tokenizer: Performance
) -> None:
    prompt, new, made = continued(score(tpq=tpq, bpm=bpm), seconds, tokenizer)
    back, num_unended = read_midi(made.dumps_midi())
    assert num_unended == 0
    assert encode(tokenizer, back).ids[:-1].tolist() == [*prompt.ids, *new]


def test_notes_pedals_and_tempo_before_the_seam_are_the_files(tokenizer: Performance) -> None:
    music = score(bpm=93.0)
    prompt, _, made = continued(music, 5.0, tokenizer)
    back = Score.from_midi(made.dumps_midi())
    seam = int(seconds_to_ticks(music, 5.0))
    ratio = back.ticks_per_quarter // music.ticks_per_quarter
    old, new = (
        {(n.time * k, n.pitch, n.velocity) for n in one.tracks[0].notes if n.time * k < seam * ratio}
        for one, k in ((music, ratio), (back, 1))
    )
    assert old == new
    controls = [
        [(c.time * k, c.number, c.value) for c in one.tracks[0].controls if c.time * k < seam * ratio]
        for one, k in ((music, ratio), (back, 1))
    ]
    assert controls[0] == controls[1]
    assert all(control.time <= seam * ratio for control in back.tracks[0].controls)
    assert back.tempos[0].mspq == music.tempos[0].mspq
    assert [(marker.time, marker.text) for marker in back.markers] == [(seam * ratio, SEAM_MARKER)]
    assert [track.program for track in back.tracks] == [0]
    assert prompt.seam == 5.0


def test_nothing_new_comes_before_the_seam(tokenizer: Performance) -> None:
    sparse = Score(480)
    sparse.tracks.append(Track("", 0, False))
    sparse.tracks[0].notes.extend([Note(0, 480, 60, 70), Note(9600, 480, 62, 70)])  # at 0 and 10 s
    prompt, new, made = continued(sparse, 7.3, tokenizer)
    assert prompt.ids == encode(tokenizer, sparse).ids[:5].tolist()
    starts = sorted(note.time for note in made.to("second").tracks[0].notes)
    assert starts[0] == 0
    assert 7.3 - 1e-3 <= starts[1] < 11.3
    assert token_ticks(tokenizer, [*prompt.ids, *new])[-1] == 1130


def test_a_pedal_that_is_never_lifted_lengthens_nothing(tokenizer: Performance) -> None:
    music = score(pedal=False)
    music.tracks[0].controls.append(ControlChange(960, 64, 127))
    music = Score.from_midi(music.dumps_midi())
    prompt, new, made = continued(music, None, tokenizer)
    assert encode(tokenizer, read_midi(made.dumps_midi())[0]).ids[:-1].tolist() == [*prompt.ids, *new]


def test_tempo_changes_are_kept_and_time_is_right(tokenizer: Performance) -> None:
    music = score(seconds=10.0)
    music.tempos.append(Tempo(1000, 60.0))
    music.tempos.append(Tempo(3000, 200.0))
    music = Score.from_midi(music.dumps_midi())
    assert seconds_to_ticks(music, [0.0, 1000 / 960, 1000 / 960 + 1.0]).tolist() == [0, 1000, 1480]
    prompt, new, made = continued(music, 6.0, tokenizer)
    assert encode(tokenizer, read_midi(made.dumps_midi())[0]).ids[:-1].tolist() == [*prompt.ids, *new]


def test_a_piece_has_the_asked_length_and_all_its_notes_end(tokenizer: Performance) -> None:
    made = generator()
    reached: list[float] = []
    pieces = continuations(made, seconds=3.0, num=2, progress=reached.append)
    for one in pieces:
        assert one.score.to("second").end() <= 3.0 + 1e-6
        assert not one.has_ended
        assert one.score.tracks[0].name == "Piano"
    assert reached[-1] == pytest.approx(6.0)


def test_an_end_beyond_the_asked_length_is_cut_off(tokenizer: Performance) -> None:
    on, off, velocity, shift = tokenizer.note_on, tokenizer.note_off, tokenizer.velocity, tokenizer.shift
    ids = [velocity + 9, on + 60, shift + 49, off + 60, EOS]
    assert end_sounding_notes(tokenizer, EMPTY_PROMPT, ids, 50) == ids
    assert end_sounding_notes(tokenizer, EMPTY_PROMPT, ids, 40) == [velocity + 9, on + 60, shift + 39, off + 60]
    assert end_sounding_notes(tokenizer, EMPTY_PROMPT, [velocity + 9, on + 60], 230) == [
        velocity + 9, on + 60, shift + 99, shift + 99, shift + 29, off + 60
    ]  # fmt: skip
    assert end_sounding_notes(tokenizer, EMPTY_PROMPT, [shift + 99, shift + 3, velocity + 9], 60) == []


def test_a_stream_gives_the_notes_of_the_tokens(tokenizer: Performance) -> None:
    made = generator()
    prompt = made.prompt(score(), 5.0)
    (one,) = continuations(made, prompt, seconds=4.0, seed=3)
    events = list(made.stream(prompt, seconds=4.0, seed=3))
    ticks = token_ticks(tokenizer, [*prompt.ids, *one.ids])[len(prompt.ids) :]
    notes = tokenizer.is_note(np.asarray(one.ids))
    assert [round(100 * event.seconds) for event in events] == ticks[notes].tolist()
    ids = np.asarray(one.ids)[notes]
    assert [event.pitch for event in events] == [(int(i) - tokenizer.note_on) % 128 for i in ids]
    assert [event.velocity == 0 for event in events] == [int(i) >= tokenizer.note_off for i in ids]
    loud = {note.velocity for note in one.score.tracks[0].notes if note.time >= seconds_to_ticks(one.score, 5.0)}
    assert {event.velocity for event in events} - {0} == loud
    endless = made.stream()
    assert len(list(islice(endless, 500))) == 500


def test_state_never_grows_and_no_token_is_kept() -> None:
    made = generator()
    steps: Iterator[list[int]] = made.tokens(may_end=False)
    next(steps)
    memory = steps.gi_frame.f_locals["memory"]  # type: ignore[attr-defined]
    places = [tensor.data_ptr() for tensor in (*memory.keys, *memory.values)]
    for _ in range(300):
        next(steps)
    assert [tensor.data_ptr() for tensor in (*memory.keys, *memory.values)] == places
    sizes = [len(v) for v in steps.gi_frame.f_locals.values() if isinstance(v, list)]  # type: ignore[attr-defined]
    assert max(sizes, default=0) <= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a MIDI file"),
        (b"garbage of some length", "not a MIDI file"),
        (None, "cannot be read"),
        ("empty", "no notes"),
        ("drums", "no piano notes .* found drums"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "in.mid"
    if content in ("empty", "drums"):
        music = Score(480)
        music.tracks.append(Track("", 0, content == "drums"))
        if content == "drums":
            music.tracks[0].notes.append(Note(0, 100, 36, 80))
        music.dump_midi(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"in.mid .*{message}"):
        generator().prompt(path)


def test_seams_that_cannot_be_are_refused() -> None:
    made = generator()
    with pytest.raises(ValueError, match="first is at"):
        made.prompt(score(), 0.01)
    with pytest.raises(ValueError, match="prompt_seconds is 0"):
        made.prompt(score(), 0.0)
    with pytest.raises(ValueError, match="seconds is 0"):
        continuations(made, seconds=0.0)
    with pytest.raises(ValueError, match="0 continuations"):
        continuations(made, seconds=1.0, num=0)


@pytest.mark.maestro
def test_real_prompts_come_back_with_their_continuations(maestro: str, tokenizer: Performance) -> None:
    made = generator()
    source = find_source(Path(maestro), "DSMR_MAESTRO")
    names = [entry.name for entry in source.entries()]
    for name in names[:: len(names) // 5]:
        music, _ = read_midi(source.read(name))
        for seconds in (11.3, 120.7):
            prompt = made.prompt(music, seconds)
            (one,) = continuations(made, prompt, seconds=2.0)
            back, num_unended = read_midi(one.score.dumps_midi())
            assert num_unended == 0
            assert encode(tokenizer, back).ids[:-1].tolist() == [*prompt.ids, *one.ids], (name, seconds)


def test_grammars_are_chosen_by_tokenizer() -> None:
    tokenizer: MusicTokenizer = build_tokenizer(TokenizerSpec())
    assert isinstance(make_grammar(tokenizer), PerformanceGrammar)
    assert not isinstance(make_grammar(build_tokenizer(TokenizerSpec("REMI"))), PerformanceGrammar)
