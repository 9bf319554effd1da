"""Untrusted input: checkpoints with code, archives that are too large when unpacked."""

import pickle
import struct
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmr import UserError
from dsmr.cli import main
from dsmr.cli.lightning_cli import QUIET
from dsmr.data.datamodule import MusicData
from dsmr.data.folder import find_source
from dsmr.data.sources import MAX_FILE_BYTES
from test_data import ROWS, make_maestro, zipped

VERSION_1 = Path(__file__).parent / "data" / "version1"


@pytest.fixture(autouse=True)
def lightnings_own_warnings() -> None:
    """Apply the program's warning filters in a test."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.proof, "it ran"))


def in_a_section(proof: Path, path: Path) -> None:
    content = torch.load(VERSION_1 / "last.ckpt", weights_only=True)
    content["dsmr"]["config"]["d_model"] = Payload(proof)
    torch.save(content, path)


def as_plain_pickle(proof: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Payload(proof)}))


def in_the_old_format(proof: Path, path: Path) -> None:
    torch.save({"dsmr": Payload(proof)}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("hide", [in_a_section, as_plain_pickle, in_the_old_format])
@pytest.mark.parametrize("command", ["fit --resume RUN", "fit --ckpt_path FILE", "validate --checkpoint RUN",
    "validate --ckpt_path FILE", "test --checkpoint RUN", "generate --output OUT --checkpoint RUN"])  # fmt: skip
def test_code_in_a_checkpoint_is_never_run(
    tmp_path: Path, command: str, hide: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run, proof = tmp_path / "run", tmp_path / "proof"
    run.mkdir()
    (run / "config.yaml").write_text((VERSION_1 / "config.yaml").read_text())
    for name in ("last.ckpt", "best.ckpt"):
        hide(proof, run / name)
    places = {"RUN": str(run), "FILE": str(run / "best.ckpt"), "OUT": str(tmp_path / "out.mid")}
    assert main([places.get(word, word) for word in command.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dsmr: error:")
    assert "cannot be loaded safely as a checkpoint" in said
    assert said.count("\n") == 1
    assert not proof.exists()
    with suppress(RuntimeError):
        torch.load(run / "last.ckpt", weights_only=False)  # the payload is live
    assert proof.exists()


def test_a_member_too_large_when_unpacked_is_refused_and_the_others_are_kept(tmp_path: Path) -> None:
    path = zipped(make_maestro(tmp_path / "data", ROWS))
    swelling = tmp_path / "swelling.zip"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(swelling, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            is_bomb = name.endswith("2004/2.midi")
            new.writestr(name, bytes(MAX_FILE_BYTES + 1) if is_bomb else old.read(name))
    assert swelling.stat().st_size < 100_000
    store = MusicData(str(swelling), max_refused_share=0.5).store
    assert store.refused == {"2004/2.midi": "larger than 16 MiB"}
    assert len(store.pieces) == 2


def test_an_archive_too_large_when_unpacked_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = zipped(make_maestro(tmp_path / "data", ROWS))
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFF0)  # what the directory says of its first member
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"would unpack to 4\.0 GiB"):
        find_source(path, "data.path").entries()


@pytest.mark.parametrize("as_zip", [False, True])
def test_a_csv_too_large_when_unpacked_is_refused(tmp_path: Path, as_zip: bool) -> None:
    folder = make_maestro(tmp_path / "data", ROWS)
    with (folder / "maestro-v3.0.0/maestro-v3.0.0.csv").open("ab") as file:
        file.write(b"," * MAX_FILE_BYTES)
    with pytest.raises(UserError, match=r"csv larger than 16 MiB"):
        find_source(zipped(folder) if as_zip else folder, "data.path").entries()


def test_a_link_in_a_run_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    """A saved file replaces a link, and leaves its target alone."""
    from dsmr.data.files import atomic_write

    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / "last.ckpt").symlink_to(precious)
    with atomic_write(tmp_path / "last.ckpt") as file:
        file.write(b"new")
    assert precious.read_text() == "kept"
    assert (tmp_path / "last.ckpt").read_bytes() == b"new"
