"""Sources, the download, the token store, generated pieces and lanes."""

import hashlib
import http.server
import shutil
import threading
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from symusic import Note, Score, Track

from conftest import write_midi
from dsmr import UserError
from dsmr.batch import IGNORED, Segment
from dsmr.data.datamodule import MusicData
from dsmr.data.folder import MidiFiles, find_source, split_by_digest
from dsmr.data.lanes import plan_stream
from dsmr.data.maestro import MAESTRO_NAME, Maestro, download_maestro
from dsmr.data.sources import Split
from dsmr.data.store import TokenStore
from dsmr.data.synthetic import NUM_MARKS, RecallTask
from dsmr.data.tokenizer import TokenizerSpec, decode, encode
from dsmr.data.transposition import allowed_shifts
from dsmr.data.vocabulary import BOS, MASK
from dsmr.data.windows import Windows
from dsmr.data.workers import WORKER_THRESHOLD

HEADER = "canonical_composer,split,midi_filename,duration\n"


def make_maestro(folder: Path, rows: list[tuple[str, str]], *, files: int = 6) -> Path:
    """A collection in MAESTRO's layout."""
    root = folder / "maestro-v3.0.0"
    for number in range(files):
        write_midi(root / f"2004/{number}.midi", number)
    root.mkdir(exist_ok=True, parents=True)
    text = HEADER + "".join(f"Someone,{split},{name},1.0\n" for split, name in rows)
    (root / "maestro-v3.0.0.csv").write_text(text, encoding="utf-8")
    return folder


def zipped(folder: Path, extra: dict[str, str] | None = None) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as file:
        for member in sorted(folder.rglob("*")):
            file.write(member, member.relative_to(folder))
        for name, text in (extra or {}).items():
            file.writestr(name, text)
    return path


ROWS = [("train", "2004/0.midi"), ("validation", "2004/1.midi"), ("train", "2004/2.midi")]


def test_zip_and_folder_give_the_same_store_with_the_official_split(tmp_path: Path) -> None:
    folder = make_maestro(tmp_path / "data", ROWS)
    stores = [MusicData(str(path)).store for path in (folder, folder / "maestro-v3.0.0", zipped(folder))]
    assert [(p.split, p.name) for p in stores[0].pieces] == ROWS
    assert len({store.path for store in stores}) == 1
    reread = TokenStore(stores[0].path)
    assert reread.tokens[0] == BOS
    assert len(reread.tokens) == sum(piece.length for piece in reread.pieces)


def test_the_environment_names_maestro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMR_MAESTRO", str(make_maestro(tmp_path / "data", ROWS)))
    assert len(MusicData().store.pieces) == 3
    monkeypatch.delenv("DSMR_MAESTRO")
    with pytest.raises(UserError, match="DSMR_MAESTRO"):
        MusicData().source()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "2004/../../x.midi", "C:\\x.midi", "..\\x.midi"])
def test_a_csv_that_climbs_out_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    folder = make_maestro(tmp_path / "data", [*ROWS, ("train", name)])
    for path in (folder, zipped(folder)):
        with pytest.raises(UserError, match=r"line 5.*leads out"):
            find_source(path, "data.path").entries()


def test_a_zip_that_climbs_out_or_links_is_refused(tmp_path: Path) -> None:
    folder = make_maestro(tmp_path / "data", ROWS)
    with pytest.raises(UserError, match="leads out"):
        find_source(zipped(folder, {"../../evil.mid": "x"}), "data.path").entries()
    path = zipped(folder)
    link = zipfile.ZipInfo("maestro-v3.0.0/link.midi")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="is a link"):
        find_source(path, "data.path").entries()


def test_a_damaged_member_is_listed_and_its_neighbours_kept(tmp_path: Path) -> None:
    folder = make_maestro(tmp_path / "data", ROWS)
    path = tmp_path / "packed.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for member in sorted(folder.rglob("*.*i*")) + list(folder.rglob("*.csv")):
            file.write(member, member.relative_to(folder))
        info = file.getinfo("maestro-v3.0.0/2004/2.midi")
    content = bytearray(path.read_bytes())
    begin = info.header_offset + 30 + len(info.filename)
    content[begin : begin + 40] = b"\xff" * 40
    path.write_bytes(content)
    store = MusicData(str(path), max_refused_share=0.5).store
    assert list(store.refused) == ["2004/2.midi"]
    assert len(store.pieces) == 2


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"split,midi_filename\ntrain,a\0b.midi\n", b"a,b\n1,2\n"])
def test_a_damaged_csv_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    folder = make_maestro(tmp_path / "data", ROWS)
    (folder / "maestro-v3.0.0/maestro-v3.0.0.csv").write_bytes(content)
    for path in (folder, zipped(folder)):
        with pytest.raises(UserError, match=r"maestro-v3.0.0.csv"):
            find_source(path, "data.path").entries()


def test_a_folder_that_links_out_is_refused(tmp_path: Path) -> None:
    folder = make_maestro(tmp_path / "data", ROWS)
    outside = write_midi(tmp_path / "outside.midi", 9)
    target = folder / "maestro-v3.0.0/2004/0.midi"
    target.unlink()
    target.symlink_to(outside)
    with pytest.raises(UserError, match="leads out"):
        find_source(folder, "data.path").entries()


def test_damaged_collections_are_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 of 4 files.*missing, first 2004/9.midi"):
        find_source(make_maestro(tmp_path / "a", [*ROWS, ("test", "2004/9.midi")]), "data.path").entries()
    with pytest.raises(UserError, match="line 5: split 'dev'"):
        find_source(make_maestro(tmp_path / "b", [*ROWS, ("dev", "2004/3.midi")]), "data.path").entries()


def test_a_folder_is_split_by_content_whatever_the_names(midi_folder: Path) -> None:
    pieces = MusicData(str(midi_folder)).store.pieces
    assert Counter(piece.split for piece in pieces) == {"train": 10, "validation": 1, "test": 1}
    assert len(pieces) == 12
    renamed = midi_folder / "a_copy_of_held_out.MID"
    held_out = next(piece for piece in pieces if piece.split == "validation")
    renamed.write_bytes((midi_folder / held_out.name).read_bytes())
    again = {piece.name: piece.split for piece in MusicData(str(midi_folder)).store.pieces}
    assert again.pop(renamed.name) == "validation"
    assert again == {piece.name: piece.split for piece in pieces}


def test_an_unreadable_file_is_listed_and_too_many_stop_the_run(midi_folder: Path) -> None:
    (midi_folder / "broken.mid").write_bytes(b"MThd but no more")
    write_midi(midi_folder / "bass.mid", 77, program=33)
    store = MusicData(str(midi_folder), max_refused_share=0.2).store
    assert Counter(piece.split for piece in store.pieces) == {"train": 10, "validation": 1, "test": 1}
    assert set(store.refused) == {"broken.mid", "bass.mid"}
    assert "found 33" in store.refused["bass.mid"]
    with pytest.raises(UserError, match=r"2 of 14 files.*bass.mid: no piano"):
        MusicData(str(midi_folder), max_refused_share=0.1, cache_dir=str(midi_folder / "other")).prepare_data()
    assert not list((midi_folder / "other").glob("*/"))


def test_a_second_call_opens_the_store_and_other_settings_make_another(midi_folder: Path) -> None:
    first = MusicData(str(midi_folder)).store
    written = (first.path / "tokens.bin").stat().st_mtime_ns
    assert MusicData(str(midi_folder)).store.path == first.path
    assert (first.path / "tokens.bin").stat().st_mtime_ns == written
    assert MusicData(str(midi_folder), tokenizer=TokenizerSpec("TSD")).store.path != first.path


def test_what_a_killed_preparation_left_is_cleared_away(midi_folder: Path) -> None:
    path = MusicData(str(midi_folder)).store.path
    abandoned = path.with_name(f".{path.name}.abcdef")
    path.rename(abandoned)
    (abandoned / "index.json").unlink()
    assert MusicData(str(midi_folder)).store.path == path
    assert not abandoned.exists()


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "cut off": ("tokens.bin", lambda content: content[:-2]),
    "a flipped bit": ("tokens.bin", lambda content: flip(content, len(content) // 2)),
    "longer": ("tokens.bin", lambda content: content + b"00"),
    "an index cut off": ("index.json", lambda content: content[:-9]),
    "another figure in the index": ("index.json", lambda content: content.replace(b'"start": 0', b'"start": 2', 1)),
    "an empty index": ("index.json", lambda content: b""),
    "another document": ("index.json", lambda content: b"[]"),
    "an older format": ("index.json", lambda content: content.replace(b'"format_version": 2', b'"format_version": 1')),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_named_and_in_the_cache_prepared_again(
    midi_folder: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = MusicData(str(midi_folder)).store.path
    elsewhere = shutil.copytree(path, midi_folder / "elsewhere")
    name, change = DAMAGE[damage]
    for folder in (path, elsewhere):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(change(whole))
        assert (folder / name).read_bytes() != whole
    with pytest.raises(UserError, match=r"elsewhere.*delete"):
        _ = MusicData(str(elsewhere)).store
    store = MusicData(str(midi_folder)).store
    assert "preparing it again" in capsys.readouterr().err
    assert TokenStore(store.path).pieces == store.pieces
    assert (store.path / name).read_bytes() == whole
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_a_store_without_its_tokens_is_named(midi_folder: Path) -> None:
    path = MusicData(str(midi_folder)).store.path
    (path / "tokens.bin").unlink()
    with pytest.raises(UserError, match=r"tokens.bin.*delete"):
        TokenStore(path)


def test_empty_folders_and_missing_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no MIDI file"):
        MusicData(str(tmp_path / "empty")).prepare_data()
    (tmp_path / "empty/garbage.mid").write_bytes(b"MThd")
    write_midi(tmp_path / "empty/one.mid", 1)
    with pytest.raises(UserError, match=r"1 of 2 files were refused.*garbage.mid: not a MIDI file"):
        MusicData(str(tmp_path / "empty")).prepare_data()
    with pytest.raises(UserError, match=r"data.path: .*does not exist"):
        MusicData(str(tmp_path / "nowhere")).prepare_data()


def test_a_single_piece_is_for_training_and_other_splits_say_that_they_are_empty(tmp_path: Path) -> None:
    write_midi(tmp_path / "midi/one.mid", 1)
    shutil.copy(tmp_path / "midi/one.mid", tmp_path / "midi/again.mid")
    data = MusicData(str(tmp_path / "midi"), segment_length=64, num_lanes=2, transpose=0)
    assert {piece.split for piece in data.store.pieces} == {"train"}
    assert sorted(pieces_of(data, data.train_dataloader())) == [0, 1]
    for split, loader in (("validation", data.val_dataloader), ("test", data.test_dataloader)):
        with pytest.raises(UserError, match=rf"no piece of the {split} split; add files, or give other --data.path"):
            loader()
    data.check_training(with_validation=False)
    with pytest.raises(UserError, match=r"train without validation \(--trainer.limit_val_batches 0\)"):
        data.check_training(with_validation=True)


@pytest.mark.parametrize(("num_pieces", "counts"), [(1, [1, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 1]), (30, [24, 3, 3])])
def test_a_tenth_is_held_out_and_something_is_left_to_train(num_pieces: int, counts: list[int]) -> None:
    splits = Counter(split_by_digest([f"{number:02d}" for number in range(num_pieces)]).values())
    assert [splits[split] for split in ("train", "validation", "test")] == counts


# Zips of MIDI files


def test_a_zip_of_midi_files_gives_the_store_of_its_folder(midi_folder: Path) -> None:
    (midi_folder / "broken.mid").write_bytes(b"MThd but no more")
    store = MusicData(str(midi_folder), max_refused_share=0.2).store
    notes = {"LICENSE": "free", "__MACOSX/._piece0.mid": "of a Mac", "deep/._x.mid": "too"}
    path = zipped(midi_folder, notes)
    data = MusicData(str(path), max_refused_share=0.2, cache_dir=str(path.parent / "other"))
    assert isinstance(data.source(), MidiFiles)
    assert data.store.path.name == store.path.name
    assert data.store.pieces == store.pieces
    assert data.store.refused.keys() == store.refused.keys() == {"broken.mid"}
    assert (data.store.tokens == store.tokens).all()
    assert not list(path.parent.rglob("__MACOSX")), "something was unpacked"


def test_odd_names_in_a_zip_are_read(midi_folder: Path) -> None:
    content = (midi_folder / "piece0.mid").read_bytes()
    path = midi_folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as file:
        for name in ("Chopin: Op. 9 No. 2.mid", "./a.mid", "b//c.mid"):
            file.writestr(name, content)
    source = MidiFiles(path)
    assert source.names() == ["Chopin: Op. 9 No. 2.mid", "a.mid", "b/c.mid"]
    assert {source.read(name) for name in source.names()} == {content}
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("C:\\evil.mid", content)
    with pytest.raises(UserError, match="leads out of the collection"):
        MidiFiles(path).names()


def test_a_zip_is_read_in_worker_processes(tmp_path: Path) -> None:
    for number in range(WORKER_THRESHOLD + 4):
        write_midi(tmp_path / f"midi/{number:02d}.mid", number, num_notes=5)
    store = MusicData(str(zipped(tmp_path / "midi"))).store
    assert [piece.name for piece in store.pieces] == [f"{number:02d}.mid" for number in range(WORKER_THRESHOLD + 4)]


def test_a_zip_of_midi_that_climbs_out_links_or_swells_is_refused(midi_folder: Path) -> None:
    with pytest.raises(UserError, match=r"leads out of the collection; unpack it"):
        MusicData(str(zipped(midi_folder, {"../../evil.mid": "x"}))).prepare_data()
    path = zipped(midi_folder)
    link = zipfile.ZipInfo("link.mid")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="is a link"):
        MusicData(str(path)).prepare_data()
    content = bytearray(zipped(midi_folder).read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 24 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little")  # what the directory says of its first member
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"would unpack to 4\.0 GiB, more than 2; unpack it"):
        MusicData(str(path)).prepare_data()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "x")
    with pytest.raises(UserError, match=r"no MIDI file .* in .*midi\.zip"):
        MusicData(str(path)).prepare_data()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("piece.mid", None, "is a single MIDI file"),
        ("cut.zip", b"PK but no more", "is not a readable zip: damaged or incomplete"),
        ("music.tar", b"something", "is neither a folder nor a zip"),
    ],
)
@pytest.mark.parametrize("is_variable", [False, True])
def test_a_file_that_is_no_collection_is_named_with_what_can_be_given(
    name: str, content: bytes | None, message: str, is_variable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_midi(tmp_path / name, 1)
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("DSMR_MAESTRO", str(path))
    option = "DSMR_MAESTRO" if is_variable else r"data\.path"
    wanted = "give a folder or a zip of MIDI files, MAESTRO's zip or folder, or a token store"
    with pytest.raises(UserError, match=f"^{option}: .*{message}; {wanted}$"):
        MusicData(None if is_variable else str(path)).prepare_data()


def test_a_zip_with_maestros_csv_stays_maestro(tmp_path: Path) -> None:
    data = MusicData(str(zipped(make_maestro(tmp_path / "data", ROWS))))
    assert isinstance(data.source(), Maestro)
    assert data.store.description.startswith("MAESTRO in ")


# Seconds of music


def test_the_tokens_of_a_second_are_those_of_the_data(midi_folder: Path) -> None:
    data = MusicData(str(midi_folder))
    events = sum(len(encode(data.tokenizer, Score(path)).ids) - 2 for path in midi_folder.rglob("*.mid"))
    seconds = sum(encode(data.tokenizer, Score(path)).seconds for path in midi_folder.rglob("*.mid"))
    assert data.tokens_per_second == pytest.approx(events / seconds)
    other = MusicData(str(midi_folder), tokenizer=TokenizerSpec("REMI"))
    assert other.tokens_per_second != pytest.approx(data.tokens_per_second, rel=0.05)


# Generated pieces


def recall(**changes: object) -> MusicData:
    task = RecallTask(num_train=24, num_validation=8)
    return MusicData(recall=task, **({"segment_length": 64, "num_lanes": 4, "transpose": 0} | changes))


def test_generated_pieces_are_valid_music_whose_answers_repeat_the_mark() -> None:
    data = recall()
    store, tokenizer = data.store, data.tokenizer
    for piece in store.pieces:
        ids = store.tokens[piece.start : piece.start + piece.length]
        marks = store.marks[piece.start : piece.start + piece.length]
        places = np.flatnonzero(marks)
        assert marks[places].tolist() == sorted(data.recall.distances)
        assert (ids[places] == ids[1]).all()
        assert (ids[places - marks[places]] == ids[1]).all(), "so far back there is no mark"
        decoded = encode(tokenizer, decode(tokenizer, ids))
        assert np.array_equal(decoded.ids, ids)
        assert decoded.num_notes == piece.num_notes
        assert decoded.seconds == pytest.approx(piece.seconds)


def test_marks_are_uniform_and_the_splits_differ() -> None:
    store = MusicData(recall=RecallTask(num_train=640, num_validation=640)).store
    counts = Counter(int(store.tokens[store.pieces[n].start + 1]) for n in store.of_split("train"))
    assert len(counts) == NUM_MARKS
    assert min(counts.values()) > 15
    whole = {
        split: {store.tokens[p.start : p.start + p.length].tobytes() for p in store.pieces if p.split == split}
        for split in ("train", "validation", "test")
    }
    assert not whole["train"] & whole["validation"]
    assert len(whole["train"]) == 640


def test_answers_are_hidden_from_the_inputs_and_asked_as_targets() -> None:
    data = recall()
    for batch in data.train_dataloader():
        asked_BT = batch.distance_BT > 0
        answers_BT = asked_BT.roll(1, dims=1)
        answers_BT[:, 0] = False
        assert (batch.tokens_BT[answers_BT] == MASK).all()
        assert not (batch.targets_BT[asked_BT] == MASK).any()
        marks = set(batch.targets_BT[asked_BT].tolist())
        seen = set(batch.tokens_BT[~batch.is_start_B].flatten().tolist())
        assert not marks & seen, "an answer can be read"


# Lanes


def pieces_of(data: MusicData, loader: torch.utils.data.DataLoader[Segment]) -> dict[int, list[int]]:
    """Targets of every piece, in the order of the batches."""
    targets: dict[int, list[int]] = {}
    for batch in loader:
        for lane, number in enumerate(batch.piece_B.tolist()):
            real = batch.targets_BT[lane][batch.targets_BT[lane] != IGNORED].tolist()
            assert number >= 0 or not real
            if number >= 0:
                assert bool(batch.is_start_B[lane]) == (number not in targets)
                assert int(batch.position_B[lane]) == len(targets.get(number, [])) + 1
                targets.setdefault(number, []).extend(real)
    return targets


@pytest.mark.parametrize(("segment_length", "num_lanes"), [(16, 1), (50, 3), (64, 7), (4096, 2)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_token_but_bos_is_predicted_exactly_once(
    midi_folder: Path, segment_length: int, num_lanes: int, num_workers: int
) -> None:
    data = MusicData(
        str(midi_folder),
        segment_length=segment_length,
        num_lanes=num_lanes,
        transpose=0,
        num_workers=num_workers,
    )
    targets = pieces_of(data, data.train_dataloader())
    assert sorted(targets) == data.pieces("train")
    for number, ids in targets.items():
        piece = data.store.pieces[number]
        assert ids == data.store.tokens[piece.start + 1 : piece.start + piece.length].tolist()


def test_the_music_time_of_a_pieces_segments_adds_up(midi_folder: Path) -> None:
    data = MusicData(str(midi_folder), segment_length=16, num_lanes=2)
    total = sum(int(batch.microseconds_B.sum()) / 1e6 for batch in data.train_dataloader())
    expected = sum(data.store.pieces[n].seconds for n in data.pieces("train"))
    assert total == pytest.approx(expected, rel=1e-5)


@given(
    st.lists(st.integers(2, 400), min_size=1, max_size=30),
    st.integers(1, 6),
    st.integers(1, 64),
    st.integers(0, 9),
)
@settings(max_examples=100, deadline=None)
def test_lanes_end_close_together(lengths: list[int], num_lanes: int, segment_length: int, epoch: int) -> None:
    numbers = list(range(len(lengths)))
    settings_ = {"segment_length": segment_length, "num_lanes": num_lanes, "seed": 1}
    plan = plan_stream(numbers, lengths, epoch=epoch, **settings_)
    loads = [-(-(length - 1) // segment_length) for length in lengths]
    assert (plan.piece_NB >= 0).sum() == sum(loads)
    ends = (plan.piece_NB >= 0).sum(axis=0)
    assert ends.max() - ends.min() <= max(loads)
    assert plan.num_steps == plan_stream(numbers, lengths, epoch=epoch + 1, **settings_).num_steps


def test_the_stream_is_a_function_of_seed_and_epoch(midi_folder: Path) -> None:
    def tokens(seed: int, epoch: int) -> list[torch.Tensor]:
        data = MusicData(str(midi_folder), segment_length=32, num_lanes=3, seed=seed)
        data.seek(epoch)
        return [batch.tokens_BT for batch in data.train_dataloader()]

    def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    assert same(tokens(1, 2), tokens(1, 2))
    assert not same(tokens(1, 2), tokens(1, 3))
    assert not same(tokens(1, 2), tokens(2, 2))


def test_transposition_moves_whole_pieces_anew_in_each_epoch_and_stays_in_range(midi_folder: Path) -> None:
    plain = MusicData(str(midi_folder), segment_length=64, num_lanes=2, transpose=0)
    moved = MusicData(str(midi_folder), segment_length=64, num_lanes=2, transpose=3)
    inverse = {id_: name for name, id_ in plain.tokenizer.vocab.items()}

    def pitches(ids: list[int]) -> np.ndarray:
        return np.array([int(inverse[i].split("_")[1]) for i in ids if inverse[i].startswith("Note")])

    shifts = set()
    original = pieces_of(plain, plain.train_dataloader())
    for epoch in range(8):
        moved.seek(epoch)
        for number, ids in pieces_of(moved, moved.train_dataloader()).items():
            difference = np.unique(pitches(ids) - pitches(original[number]))
            assert len(difference) == 1
            shifts.add(int(difference[0]))
    assert shifts == {-3, -2, -1, 0, 1, 2, 3}


@pytest.mark.parametrize(
    ("lowest", "highest", "expected"),
    [
        (40, 90, (-3, 3)),
        (21, 90, (0, 3)),
        (23, 107, (-2, 1)),
        (21, 108, (0, 0)),
        (15, 90, (0, 3)),  # below the keys already: no lower than it is
        (15, 120, (0, 0)),
        (40, 112, (-3, 0)),
    ],
)
def test_shifts_stay_on_the_piano_or_within_what_the_piece_has(
    lowest: int, highest: int, expected: tuple[int, int]
) -> None:
    assert allowed_shifts(lowest, highest, 3, (0, 127)) == expected


def test_shifts_stay_within_the_tokenizers_pitches() -> None:
    assert allowed_shifts(40, 90, 3, (39, 91)) == (-1, 1)
    assert allowed_shifts(30, 30, 12, (0, 127)) == (-9, 12)


def played_pitches(data: MusicData, epoch: int) -> dict[int, set[int]]:
    """Pitches of every training piece as it is read in an epoch."""
    names = {id_: name.split("_") for name, id_ in data.tokenizer.vocab.items()}
    data.seek(epoch)
    targets = pieces_of(data, data.train_dataloader())
    return {n: {int(names[i][1]) for i in ids if names[i][0].startswith("NoteO")} for n, ids in targets.items()}


def test_no_transposed_piece_leaves_the_piano(tmp_path: Path) -> None:
    for number, (low, high) in enumerate(
        [(21, 60), (23, 60), (60, 107), (60, 108), (18, 60), (60, 111), (40, 70)] * 2
    ):
        score = Score(480)
        score.tracks.append(Track("", 0, False))
        score.tracks[0].notes.extend(Note(480 * k, 240, pitch, 60 + number) for k, pitch in enumerate((low, high)))
        (tmp_path / "midi").mkdir(exist_ok=True)
        score.dump_midi(tmp_path / f"midi/{number}.mid")
    data = MusicData(str(tmp_path / "midi"), segment_length=16, num_lanes=2, transpose=3)
    seen: dict[int, set[tuple[int, int]]] = {}
    for epoch in range(40):
        for number, pitches in played_pitches(data, epoch).items():
            seen.setdefault(number, set()).add((min(pitches), max(pitches)))
    for number, ranges in seen.items():
        piece = data.store.pieces[number]
        assert min(low for low, _ in ranges) >= min(21, piece.pitch_min)
        assert max(high for _, high in ranges) <= max(108, piece.pitch_max)
        low, high = allowed_shifts(piece.pitch_min, piece.pitch_max, 3, (0, 127))
        assert {first - piece.pitch_min for first, _ in ranges} == set(range(low, high + 1)), "a shift is never drawn"


@pytest.mark.maestro
def test_no_transposed_piece_of_the_real_maestro_leaves_the_piano(
    maestro: str,
) -> None:
    data = MusicData(maestro, segment_length=2048, num_lanes=32, transpose=3)
    plain = {n: (data.store.pieces[n].pitch_min, data.store.pieces[n].pitch_max) for n in data.pieces("train")}
    assert (min(low for low, _ in plain.values()), max(high for _, high in plain.values())) == (21, 108)
    for epoch in range(2):
        played = played_pitches(data, epoch)
        moved = sum((min(pitches), max(pitches)) != plain[number] for number, pitches in played.items())
        assert moved > len(plain) / 2
        assert min(map(min, played.values())) == 21
        assert max(map(max, played.values())) == 108


def test_another_number_of_processes_is_refused_by_the_trainers_names(midi_folder: Path) -> None:
    saved = MusicData(str(midi_folder)).state_dict()
    data = MusicData(str(midi_folder))
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), world_size=2)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"trainer.devices x trainer.num_nodes = 1, now it is 2"):
        data.load_state_dict(saved)


def test_a_stream_goes_on_where_it_was_saved(midi_folder: Path) -> None:
    settings_ = {"segment_length": 16, "num_lanes": 2}
    data = MusicData(str(midi_folder), **settings_)
    data.seek(1)
    whole = list(data.train_dataloader())
    for batch in whole[:5]:
        data.advance(batch.step)
    resumed = MusicData(str(midi_folder), **settings_)
    resumed.seek(data.state_dict()["epoch"], data.state_dict()["next_step"])
    loader = resumed.train_dataloader()
    rest = list(loader)
    assert len(loader) == len(whole)
    assert [b.step for b in rest] == [b.step for b in whole[5:]]
    assert all(torch.equal(a.tokens_BT, b.tokens_BT) for a, b in zip(rest, whole[5:], strict=True))
    for batch in rest:
        resumed.advance(batch.step)
    assert (resumed.state_dict()["epoch"], resumed.state_dict()["next_step"]) == (2, 0)


def windowed(**changes: Any) -> MusicData:
    """Generated pieces of about 1,000 tokens as windows of 100."""
    settings = {"segment_length": 100, "windows": Windows(30)} | changes
    return MusicData(recall=RecallTask(num_train=12, num_validation=5), num_lanes=3, transpose=0, **settings)


def scored(loader: torch.utils.data.DataLoader[Segment]) -> list[tuple[int, int]]:
    """Piece and place of every scored target; each window's targets are checked to be the next tokens."""
    places = []
    for batch in loader:
        assert batch.is_start_B.all(), "a window that reads a memory"
        for lane in range(3):
            counted = (batch.targets_BT[lane] != IGNORED).nonzero().flatten()
            first = int(batch.position_B[lane])
            places += [(int(batch.piece_B[lane]), first + i) for i in range(len(counted))]
            if len(counted):
                assert counted.tolist() == list(range(int(counted[0]), int(counted[-1]) + 1))
    return places


def all_places(data: MusicData, split: Split) -> list[tuple[int, int]]:
    return [(n, i) for n in data.pieces(split) for i in range(1, data.store.pieces[n].length)]


def test_an_epoch_of_training_windows_predicts_every_token_once_from_other_cuts_in_another_order() -> None:
    data = windowed()
    first = scored(data.train_dataloader())
    data.seek(1)
    second = scored(data.train_dataloader())
    assert sorted(first) == sorted(second) == all_places(data, "train")
    starts = [{(b.piece_B[0].item(), b.position_B[0].item()) for b in data.train_dataloader()} for _ in (0, 1)]
    assert starts[0] == starts[1], "the stream has been read, but not consumed"
    assert first != second
    assert first != sorted(first), "not shuffled"
    data.seek(0)
    assert scored(data.train_dataloader()) == first


@pytest.mark.parametrize("stride", [1, 30, 100])
def test_strided_windows_score_every_token_once_with_their_context(stride: int) -> None:
    data = windowed(windows=Windows(stride))
    tokens, marks = data.store.tokens, data.store.marks
    assert marks is not None
    places = []
    for batch in data.val_dataloader():
        for lane in range(3):
            number = int(batch.piece_B[lane])
            counted = (batch.targets_BT[lane] != IGNORED).nonzero().flatten()
            if number < 0:
                assert not len(counted)
                continue
            place, context = int(batch.position_B[lane]), int(counted[0])
            assert place - 1 == context or context >= 100 - stride, "too little context"
            piece = data.store.pieces[number]
            read = slice(piece.start + place - 1 - context, piece.start + place + len(counted))
            hidden = np.where(marks[read] > 0, MASK, tokens[read])
            assert batch.tokens_BT[lane, : context + len(counted)].tolist() == hidden[:-1].tolist()
            assert batch.targets_BT[lane, counted].tolist() == tokens[read][context + 1 :].tolist()
            assert (batch.distance_BT[lane] > 0).sum() == (marks[read][context + 1 :] > 0).sum()
            places += [(number, place + i) for i in range(len(counted))]
    assert sorted(places) == all_places(data, "validation")
    assert len(places) == len(set(places))


def test_random_windows_are_one_of_each_piece_and_always_the_same() -> None:
    data = windowed(windows=Windows(protocol="random"))
    first, again = (scored(data.val_dataloader()) for _ in range(2))
    assert first == again
    assert Counter(piece for piece, _ in first) == dict.fromkeys(data.pieces("validation"), 100)
    assert len({place for _, place in first[::100]}) > 1, "not random"
    whole = windowed(windows=Windows(protocol="random"), segment_length=5000)
    assert sorted(scored(whole.val_dataloader())) == all_places(whole, "validation")


def test_the_music_time_of_windows_adds_up() -> None:
    data = windowed()
    seconds = sum(data.store.pieces[n].seconds for n in data.pieces("validation"))
    total = sum(int(batch.microseconds_B.sum()) for batch in data.val_dataloader())
    assert total == pytest.approx(1e6 * seconds, rel=1e-6)


def test_impossible_windows_are_refused() -> None:
    with pytest.raises(UserError, match=r"stride 101 exceeds data\.segment_length 100"):
        windowed(windows=Windows(101))
    with pytest.raises(UserError, match="at least 1"):
        Windows(0)
    with pytest.raises(UserError, match="strided, random"):
        Windows(protocol="rnadom")  # type: ignore[arg-type]


def test_validation_stride_takes_every_nth_piece_in_the_sources_order(tmp_path: Path) -> None:
    rows = [("train", "2004/0.midi"), *[("validation", f"2004/{n}.midi") for n in range(1, 6)]]
    data = MusicData(str(make_maestro(tmp_path / "data", rows)), validation_stride=2)
    assert [data.store.pieces[n].name for n in data.pieces("validation")] == [f"2004/{n}.midi" for n in (1, 3, 5)]


@pytest.mark.maestro
def test_the_real_maestro_keeps_every_note_and_its_onset(maestro: str) -> None:
    source = find_source(Path(maestro), "DSMR_MAESTRO")
    entries = source.entries()
    assert Counter(entry.split for entry in entries) == {"train": 962, "validation": 137, "test": 177}
    tokenizer = MusicData().tokenizer
    events, notes, errors = 0, 0, []
    for entry in entries[::64]:
        score = Score.from_midi(source.read(entry.name))
        encoded = encode(tokenizer, score)
        decoded = decode(tokenizer, encoded.ids)
        assert np.array_equal(encode(tokenizer, decoded).ids, encoded.ids)
        played, given = (s.to("second").tracks[0].notes.numpy() for s in (decoded, score))
        order, order_given = (np.lexsort([n["time"], n["pitch"]]) for n in (played, given))
        assert np.array_equal(played["pitch"][order], given["pitch"][order_given]), "a note is lost"
        errors.append(np.abs(played["time"][order] - given["time"][order_given]))
        events += len(encoded.ids) - 2
        notes += encoded.num_notes
    assert np.concatenate(errors).mean() <= 0.003
    assert 4.0 <= events / notes <= 4.1


def test_a_store_that_was_prepared_elsewhere_needs_no_midi(midi_folder: Path, tmp_path: Path) -> None:
    made = MusicData(str(midi_folder)).store
    moved = shutil.copytree(made.path, tmp_path / "moved")
    store = MusicData(str(moved)).store
    assert store.path == moved
    assert store.pieces == made.pieces
    assert (store.tokens == made.tokens).all()
    with pytest.raises(UserError, match=r"was tokenised with .*'performance'.* but data\.tokenizer is .*'REMI'"):
        MusicData(str(moved), tokenizer=TokenizerSpec(name="REMI")).prepare_data()
    (moved / "tokens.bin").write_bytes(b"12")
    with pytest.raises(UserError, match="is damaged"):
        MusicData(str(moved)).prepare_data()


# Downloads


class Server:
    """An HTTP server with one file, that breaks off, fails, or sends another file for the first requests."""

    def __init__(self, content: bytes, faults: list[str]) -> None:
        server = self
        self.num_requests = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fault = faults[server.num_requests] if server.num_requests < len(faults) else ""
                server.num_requests += 1
                if fault.isdigit():
                    self.send_error(int(fault))
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                sent = content[::-1] if fault == "another file" else content
                self.wfile.write(sent[: len(sent) // 2] if fault == "breaks off" else sent)
                self.close_connection = True

            def log_message(self, *_: Any) -> None:
                """Keep quiet."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/{MAESTRO_NAME}"
        self.sha256 = hashlib.sha256(content).hexdigest()

    def __enter__(self) -> "Server":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


ZIP = bytes(range(256)) * 4000


@pytest.mark.parametrize(
    "faults", [[], ["breaks off"], ["503"], ["another file"], ["breaks off", "503", "another file", "breaks off"]]
)
def test_a_download_is_tried_again_and_a_file_that_is_there_is_not_fetched(
    tmp_path: Path, faults: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pooch.core.time.sleep", lambda _: None)
    with Server(ZIP, faults) as server:
        path = download_maestro(tmp_path / "cache", url=server.url, sha256=server.sha256)
        assert path == tmp_path / "cache" / MAESTRO_NAME
        assert path.read_bytes() == ZIP
        assert list(path.parent.iterdir()) == [path], "something else was left"
        assert server.num_requests == len(faults) + 1
        assert download_maestro(path.parent, url=server.url, sha256=server.sha256) == path
        assert server.num_requests == len(faults) + 1
        path.write_bytes(b"damaged")
        assert download_maestro(path.parent, url=server.url, sha256=server.sha256).read_bytes() == ZIP
    assert download_maestro(path.parent, url=server.url, sha256=server.sha256) == path, "it needs the network"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("breaks off", r"cannot download http.*IncompleteRead.*; try again later, or download the zip by hand"),
        ("404", r"cannot download http.*404.*; try again later, or download the zip by hand"),
        ("another file", r"sent a file with a wrong checksum, not [0-9a-f]{64}; .*set DSMR_MAESTRO to it"),
    ],
)
def test_a_download_that_fails_says_what_to_do_and_leaves_nothing(
    tmp_path: Path, fault: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pooch.core.time.sleep", lambda _: None)
    with Server(ZIP, [fault] * 9) as server, pytest.raises(UserError, match=message) as caught:
        download_maestro(tmp_path, url=server.url, sha256=server.sha256)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="cannot download"):
        download_maestro(tmp_path, url=server.url, sha256=server.sha256)  # nobody answers


def test_a_folder_that_cannot_be_written_names_the_settings(tmp_path: Path) -> None:
    (tmp_path / "occupied").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot write .*occupied .*set DSMR_CACHE or data\.cache_dir"):
        download_maestro(tmp_path / "occupied")


def test_generated_pieces_take_no_tokenizer() -> None:
    with pytest.raises(UserError, match=r"performance tokens; leave out data\.tokenizer"):
        MusicData(recall=RecallTask(), tokenizer=TokenizerSpec("REMI"))
