"""The `performance` encoding, other tokenizers, and the way back to MIDI."""

import linecache
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from symusic import ControlChange, Note, Score, Tempo, Track

from conftest import write_midi
from dsmr.data.performance import extend_by_pedal
from dsmr.data.preparation import store_key
from dsmr.data.sources import Refused
from dsmr.data.tokenizer import TokenizerSpec, build_tokenizer, decode, encode
from dsmr.data.transposition import transposition_tables
from dsmr.data.vocabulary import BOS, EOS, SPECIAL_TOKENS, note_on_mask

PERFORMANCE = build_tokenizer(TokenizerSpec())


def piece(
    notes: list[tuple[int, int, int, int]],
    controls: tuple[tuple[int, int], ...] | list[tuple[int, int]] = (),
    qpm: float = 120,
) -> Score:
    """Notes (start, length, pitch, velocity) and pedal events (time, value), in ms at 120 BPM."""
    score = Score(500)
    score.tempos.append(Tempo(0, qpm))
    track = Track()
    track.notes.extend([Note(*note) for note in notes])
    track.controls.extend([ControlChange(time, 64, value) for time, value in controls])
    score.tracks.append(track)
    return Score.from_midi(score.dumps_midi())


def names(score: Score) -> list[str]:
    inverse = {id_: name for name, id_ in PERFORMANCE.vocab.items()}
    return [inverse[int(id_)] for id_ in encode(PERFORMANCE, score).ids[1:-1]]


def shift(ticks: int) -> str:
    return f"TimeShift_{ticks // 50}.{ticks % 50}.50"


def test_the_vocabulary_is_the_published_one_and_the_special_tokens() -> None:
    kinds = [name.split("_")[0] for name in PERFORMANCE.vocab]
    counts = {kind: kinds.count(kind) for kind in ("NoteOn", "NoteOff", "TimeShift", "Velocity")}
    assert counts == {"NoteOn": 128, "NoteOff": 128, "TimeShift": 100, "Velocity": 32}
    assert len(PERFORMANCE.vocab) == 388 + len(SPECIAL_TOKENS)
    assert [PERFORMANCE.vocab[f"{name}_None"] for name in SPECIAL_TOKENS] == [0, 1, 2, 3]


def test_velocity_comes_before_a_note_and_only_when_it_changes() -> None:
    score = piece([(0, 100, 60, 64), (200, 100, 62, 64), (400, 100, 64, 100)])
    assert names(score) == [
        "Velocity_63", "NoteOn_60", shift(10), "NoteOff_60", shift(10), "NoteOn_62", shift(10), "NoteOff_62",
        shift(10), "Velocity_99", "NoteOn_64", shift(10), "NoteOff_64",
    ]  # fmt: skip


def test_note_offs_come_before_note_ons_within_a_tick() -> None:
    assert names(piece([(0, 100, 72, 63), (100, 100, 60, 63)])) == [
        "Velocity_63", "NoteOn_72", shift(10), "NoteOff_72", "NoteOn_60", shift(10), "NoteOff_60",
    ]  # fmt: skip


def test_long_times_are_full_shifts_and_a_rest() -> None:
    assert names(piece([(0, 2350, 60, 63)]))[2:-1] == [shift(100), shift(100), shift(35)]
    assert names(piece([(0, 2000, 60, 63)]))[2:-1] == [shift(100), shift(100)]


def test_a_note_lasts_at_least_one_tick_and_no_strike_is_lost() -> None:
    score = piece([(0, 2, 60, 63), (3, 2, 60, 63), (6, 2, 60, 63)])
    assert names(score)[1:] == ["NoteOn_60", shift(1), "NoteOff_60"] + [
        "NoteOn_60", shift(1), "NoteOff_60",
    ] * 2  # fmt: skip


def test_a_note_lasts_until_the_pedal_is_released_or_its_pitch_struck_again() -> None:
    score = piece(
        [(0, 100, 60, 63), (50, 100, 64, 63), (500, 100, 60, 63), (2000, 100, 67, 63)], [(80, 127), (1000, 0)]
    )
    notes = sorted(
        (n.pitch, n.time * 10, n.end * 10) for n in decode(PERFORMANCE, encode(PERFORMANCE, score).ids).tracks[0].notes
    )
    assert notes == [(60, 0, 500), (60, 500, 1000), (64, 50, 1000), (67, 2000, 2100)]


def test_a_note_that_ends_before_the_pedal_goes_down_is_not_extended() -> None:
    onset, offset = extend_by_pedal(
        {"time": np.array([0.0, 0.5]), "duration": np.array([0.2, 0.3])},
        {"time": np.array([0.3, 2.0]), "duration": np.array([0.6, 1.0])},
    )
    assert offset.tolist() == pytest.approx([0.2, 0.9])
    assert onset.tolist() == [0.0, 0.5]


def test_overlapping_pedals_of_two_hands_are_one() -> None:
    _, offset = extend_by_pedal(
        {"time": np.array([0.0, 1.0]), "duration": np.array([3.0, 9.5])},
        {"time": np.array([4.0, 0.0, 10.0]), "duration": np.array([5.0, 5.0, 2.0])},
    )
    assert offset.tolist() == [9.0, 12.0]


def test_a_shift_is_ten_milliseconds_at_any_tempo() -> None:
    assert names(piece([(0, 100, 60, 63)], qpm=60))[2] == shift(20)


@st.composite
def scores(draw: st.DrawFn) -> Score:
    note = st.tuples(st.integers(0, 9000), st.integers(0, 3000), st.integers(0, 127), st.integers(1, 127))
    pedal = st.tuples(st.integers(0, 9000), st.sampled_from([0, 127]))
    return piece(draw(st.lists(note, min_size=1, max_size=40)), draw(st.lists(pedal, max_size=8)))


@given(scores())
@settings(max_examples=150, deadline=None)
def test_encoding_what_was_decoded_gives_the_same_tokens(score: Score) -> None:
    encoded = encode(PERFORMANCE, score)
    again = encode(PERFORMANCE, decode(PERFORMANCE, encoded.ids))
    assert np.array_equal(again.ids, encoded.ids)
    assert encoded.num_notes == again.num_notes
    assert encoded.ids[0] == BOS
    assert encoded.ids[-1] == EOS


@given(scores())
@settings(max_examples=100, deadline=None)
def test_no_note_is_lost(score: Score) -> None:
    encoded = encode(PERFORMANCE, score)
    assert encoded.num_notes == score.note_num()
    assert sorted(n.pitch for n in decode(PERFORMANCE, encoded.ids).tracks[0].notes) == sorted(
        n.pitch for n in score.tracks[0].notes
    )


@pytest.mark.parametrize("name", ["REMI", "TSD", "MIDILike"])
def test_other_miditok_tokenizers_by_name(name: str, tmp_path) -> None:
    tokenizer = build_tokenizer(TokenizerSpec(name, {"beat_res": {"0_4": 8}, "use_tempos": False}))
    score = Score(write_midi(tmp_path / "a.mid", 0))
    encoded = encode(tokenizer, score)
    assert encoded.num_notes == note_on_mask(tokenizer)[encoded.ids].sum() == 60
    assert decode(tokenizer, encoded.ids).note_num() > 50


def test_unknown_tokenizers_and_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="REMI"):
        build_tokenizer(TokenizerSpec("Remy"))
    with pytest.raises(ValueError, match="did you mean num_velocities"):
        build_tokenizer(TokenizerSpec("REMI", {"num_velocites": 8}))
    with pytest.raises(ValueError, match="beat_res"):
        build_tokenizer(TokenizerSpec("REMI", {"beat_res": {"0-4": 8}}))
    with pytest.raises(ValueError, match="takes no settings"):
        build_tokenizer(TokenizerSpec("performance", {"num_velocities": 8}))
    with pytest.raises(ValueError, match="several streams"):
        build_tokenizer(TokenizerSpec("Octuple"))


PERTOK = {
    "ticks_per_quarter": 320,
    "use_microtiming": True,
    "max_microtiming_shift": 0.125,
    "num_microtiming_bins": 30,
}
ONE_STREAM: dict[str, TokenizerSpec] = {
    "REMI": TokenizerSpec("REMI"),
    "REMI with programs": TokenizerSpec("REMI", {"use_programs": True}),
    "REMI with pitch intervals": TokenizerSpec("REMI", {"use_pitch_intervals": True}),
    "REMI with pedals, rests, chords and tempi": TokenizerSpec(
        "REMI", {"use_sustain_pedals": True, "use_rests": True, "use_chords": True, "use_tempos": True}
    ),
    "REMI with numbered bars": TokenizerSpec("REMI", {"max_bar_embedding": 120}),
    "TSD": TokenizerSpec("TSD"),
    "MIDILike": TokenizerSpec("MIDILike", {"max_duration": [4, 0, 8]}),
    "Structured": TokenizerSpec("Structured"),
    "PerTok": TokenizerSpec("PerTok", PERTOK),
    "PerTok with positions": TokenizerSpec("PerTok", {"additional_params": {**PERTOK, "use_position_toks": True}}),
    "PerTok without microtiming": TokenizerSpec(
        "PerTok", {"ticks_per_quarter": 320, "use_microtiming": False, "max_microtiming_shift": 0.125}
    ),
    "MMM of REMI": TokenizerSpec("MMM", {"base_tokenizer": "REMI", "use_bar_end_tokens": True}),
    "MMM of TSD": TokenizerSpec("MMM", {"additional_params": {"base_tokenizer": "TSD"}}),
}
"""Tokenizers whose notes are as many as their note-on tokens; BEAT's are fewer, since it writes long notes again."""


@pytest.mark.parametrize("name", [*ONE_STREAM, "BEAT"])
def test_every_tokenizer_of_one_stream_encodes_and_decodes(name: str, tmp_path) -> None:
    tokenizer = build_tokenizer(ONE_STREAM.get(name, TokenizerSpec(name)))
    score = Score(write_midi(tmp_path / "a.mid", 0))
    encoded = encode(tokenizer, score)
    music = decode(tokenizer, encoded.ids)
    assert len(music.tracks) == 1
    if name == "BEAT":
        assert encoded.num_notes > 60
    else:
        assert encoded.num_notes == 60
    assert abs(music.note_num() - 60) <= 2, "what falls onto one grid point is one note"
    assert encoded.ids[0] == BOS
    assert encoded.ids[-1] == EOS


@pytest.mark.parametrize("name", ONE_STREAM)
def test_tokens_of_other_tokenizers_transpose_the_music(name: str, tmp_path) -> None:
    tokenizer = build_tokenizer(ONE_STREAM[name])
    ids = encode(tokenizer, Score(write_midi(tmp_path / "a.mid", 3))).ids
    tables = transposition_tables(tokenizer, 2)
    pitches = [decode(tokenizer, table[ids]).tracks[0].notes.numpy()["pitch"] for table in tables]
    for semitones, moved in zip(range(-2, 3), pitches, strict=True):
        assert np.array_equal(np.sort(moved), np.sort(pitches[2]) + semitones)


def test_tokens_that_name_intervals_are_not_transposed() -> None:
    with pytest.raises(ValueError, match=r"cannot be transposed one by one; set data\.transpose to 0"):
        transposition_tables(build_tokenizer(TokenizerSpec("BEAT")), 3)


SETTINGS: dict[str, tuple[str, dict[str, object], str]] = {
    "a typo": ("REMI", {"num_velocites": 8}, "no setting 'num_velocites' for REMI; did you mean num_velocities?"),
    "a typo of a class's own setting": ("REMI", {"max_bar_embeding": 8}, "did you mean max_bar_embedding?"),
    "a typo in additional_params": (
        "PerTok",
        {"additional_params": PERTOK | {"ticks_per_quater": 1}},
        "PerTok does not read 'ticks_per_quater' there; did you mean ticks_per_quarter?",
    ),
    "another class's setting": ("TSD", {"max_bar_embedding": 8}, "no setting 'max_bar_embedding' for TSD"),
    "a general setting in additional_params": (
        "REMI",
        {"additional_params": {"num_velocities": 8}},
        "does not read 'num_velocities' there; give it in data.tokenizer.config itself",
    ),
    "additional_params that are none": ("REMI", {"additional_params": [1]}, "it must be a mapping"),
    "the name of MidiTok's own keywords": ("REMI", {"kwargs": 1}, "no setting 'kwargs'"),
    "what PerTok needs": (
        "PerTok",
        {"ticks_per_quarter": 320},
        "PerTok needs use_microtiming, max_microtiming_shift, num_microtiming_bins; for example",
    ),
    "what MMM needs": ("MMM", {}, 'MMM needs base_tokenizer; for example {"base_tokenizer": "REMI"}'),
    "what MMM cannot be made of": ("MMM", {"base_tokenizer": "Octuple"}, "MidiTok's MMM refuses"),
    "PerTok with pedals": (
        "PerTok",
        PERTOK | {"use_sustain_pedals": True},
        "cannot encode a piano piece and decode it again (AttributeError: 'int' object has no attribute 'int'); set "
        "use_sustain_pedals to false",
    ),
    "PerTok with tempi": ("PerTok", PERTOK | {"use_tempos": True}, "cannot encode a piano piece and decode it again"),
    "other special tokens": ("REMI", {"special_tokens": ["PAD"]}, "are always PAD, BOS, EOS, MASK; leave them out"),
    "several streams": ("CPWord", {}, "CPWord writes several streams at once"),
    "another spelling": ("pertok", {}, "did you mean PerTok?"),
    "no tokenizer": ("MusicTokenizer", {}, "known: BEAT"),
    "a module that is not there": ("nowhere.Mine", {}, "nowhere to PYTHONPATH, or install it"),
    "a class that is not there": ("miditok.Mine", {}, "miditok.Mine cannot be imported"),
    "a class that is no tokenizer": ("json.JSONDecoder", {}, "is not a subclass of miditok.MusicTokenizer"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_are_refused_in_one_line(case: str) -> None:
    name, config, message = SETTINGS[case]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        build_tokenizer(TokenizerSpec(name, config))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


OWN = """
from miditok import TSD

class Mine(TSD):
    def _tweak_config_before_creating_voc(self):
        super()._tweak_config_before_creating_voc()
        self.mine = self.config.additional_params.get("mine", 1)

class OneWay(TSD):
    def _tokens_to_score(self, *arguments):
        raise NotImplementedError("no way back")

class Mute(TSD):
    def _tokens_to_score(self, *arguments):
        score = super()._tokens_to_score(*arguments)
        score.tracks[0].notes.clear()
        return score
"""


def test_a_tokenizer_class_of_ones_own(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_tokens.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    tokenizer = build_tokenizer(TokenizerSpec("own_tokens.Mine", {"additional_params": {"mine": 3}}))
    assert tokenizer.mine == 3
    with pytest.raises(ValueError, match=r"'mine' for Mine; what only your class reads goes into additional_params"):
        build_tokenizer(TokenizerSpec("own_tokens.Mine", {"mine": 3}))
    with pytest.raises(ValueError, match=r"own_tokens.OneWay .* decode it again \(NotImplementedError: no way back\)"):
        build_tokenizer(TokenizerSpec("own_tokens.OneWay"))
    with pytest.raises(ValueError, match=r"own_tokens.Mute with this config decodes no note"):
        build_tokenizer(TokenizerSpec("own_tokens.Mute"))


def test_a_store_knows_the_source_of_a_tokenizer_of_ones_own(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own_source.py"
    path.write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    first = store_key(TokenizerSpec("own_source.Mine"), [])
    assert store_key(TokenizerSpec("own_source.Mine"), []) == first
    assert first.startswith("own_source.Mine-")
    path.write_text(OWN + "# changed\n")
    linecache.clearcache()
    assert store_key(TokenizerSpec("own_source.Mine"), []) != first


def test_only_piano_is_read_and_hands_are_merged() -> None:
    score = piece([(0, 100, 60, 63)])
    left, bass, drums = Track("", 1), Track("", 33), Track("", 0, True)
    for track in (left, bass, drums):
        track.notes.append(Note(0, 100, 40, 63))
    score.tracks.extend([left, bass, drums])
    assert encode(PERFORMANCE, score).num_notes == 2
    del score.tracks[:2]
    with pytest.raises(Refused, match=r"found 33, drums"):
        encode(PERFORMANCE, score)


def test_transposing_tokens_is_transposing_music(tmp_path) -> None:
    score = Score(write_midi(tmp_path / "a.mid", 3))
    tables = transposition_tables(PERFORMANCE, 3)
    for semitones in range(-3, 4):
        moved = score.copy()
        for note in moved.tracks[0].notes:
            note.pitch += semitones
        ids = tables[semitones + 3][encode(PERFORMANCE, score).ids]
        played = sorted((n.time, n.pitch) for n in decode(PERFORMANCE, ids).tracks[0].notes)
        expected = decode(PERFORMANCE, encode(PERFORMANCE, moved).ids)
        assert played == sorted((n.time, n.pitch) for n in expected.tracks[0].notes)
