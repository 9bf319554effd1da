"""Exported models: whole, checked, without paths, and the same function as the run."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dsmr.generate import Generator
from dsmr.model import PerceiverAR, RecurrentTransformer
from dsmr.model.backbone import Backbone
from dsmr.results.run_files import SECTION
from dsmr.share import exported
from dsmr.share.description import describe_network
from dsmr.share.export import export_model
from dsmr.share.loading import load_model

PERFORMANCE = {"name": "performance", "config": {}}


def network(kind: str) -> Backbone:
    torch.manual_seed(0)
    if kind == "perceiver":
        return PerceiverAR(392, 16, prefix_length=32, d_model=32, num_layers=2, num_heads=2)
    return RecurrentTransformer(392, "1x32+1x16", 16, d_model=32, num_layers=2, num_heads=2, memory_block=16)


def run_of(
    folder: Path, kind: str = "recurrent", data: str | None = "MAESTRO", tokenizer: object = PERFORMANCE
) -> Path:
    """A run as training leaves it: checkpoint, settings, metrics."""
    folder.mkdir(parents=True)
    backbone = network(kind)
    section = describe_network(backbone, tokenizer, data)  # type: ignore[arg-type]
    weights = {f"backbone.{name}": weight for name, weight in backbone.state_dict().items()}
    torch.save({SECTION: section, "state_dict": weights}, folder / "best.ckpt")
    config = {
        "root": "/home/somebody/runs",
        "trainer": {"limit_val_batches": None, "logger": {"class_path": "WandbLogger", "init_args": {"entity": "me"}}},
        "model": {"horizons": "1x32+1x16", "backbone": {"init_args": {"num_layers": 2}}},
        "data": {
            "path": "/home/somebody/secret",
            "cache_dir": "/home/x",
            "segment_length": 16,
            "validation_stride": 4,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = ["epoch,step,val/nll,val/perplexity,val/nats_per_note,val/nats_per_second,val/tokens"]
    rows += ["0,9,2.5,12.18,9.1,90.0,1234", "0,19,2.25,9.488,8.2,81.0,1234"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("kind", ["recurrent", "perceiver"])
def test_an_exported_model_is_the_same_function(kind: str, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", kind)
    export_model(run, tmp_path / "model")
    first, second = load_model(run), load_model(tmp_path / "model")
    assert first.backbone.config() == second.backbone.config()
    for name, weight in first.backbone.state_dict().items():
        assert torch.equal(weight, second.backbone.state_dict()[name])
    music = [next(Generator.load(path).tokens(seed=3)) for path in (run, tmp_path / "model")]
    assert music[0] == music[1]
    assert load_model(tmp_path / "model", horizons=None if kind == "perceiver" else "2x64").data == "MAESTRO"


def test_the_card_has_metrics_and_licence_and_the_settings_no_paths(tmp_path: Path) -> None:
    export_model(run_of(tmp_path / "run"), tmp_path / "model")
    card = (tmp_path / "model" / exported.CARD).read_text()
    assert "license: cc-by-nc-sa-4.0" in card
    assert "| 2.2500 | 9.4880 | 8.2000 | 81.0000 |" in card
    assert "1,234 tokens of the validation split (every 4th piece)" in card
    assert "Hawthorne" in card
    assert "`1x32+1x16`" in card
    everything = "".join(path.read_text(errors="replace") for path in (tmp_path / "model").iterdir())
    assert "somebody" not in everything
    assert "/home" not in everything
    assert "entity" not in everything
    description = json.loads((tmp_path / "model" / exported.CONFIG).read_text())
    assert description["measured"]["partial"] is True
    assert set(description["files"]) == {exported.WEIGHTS, exported.TOKENIZER, exported.SETTINGS}


@pytest.mark.parametrize(
    ("data", "licence", "expected"),
    [
        (None, None, "license: other"),
        ("MIDI files", None, "license: other"),
        ("generated recall pieces", None, "license: apache-2.0"),
        ("MIDI files", "cc0-1.0", "license: cc0-1.0"),
    ],
)
def test_the_licence_follows_from_the_data_or_is_given(
    data: str | None, licence: str | None, expected: str, tmp_path: Path
) -> None:
    export_model(run_of(tmp_path / "run", data=data), tmp_path / "model", licence=licence)
    assert expected in (tmp_path / "model" / exported.CARD).read_text()


@pytest.mark.parametrize("name", [exported.WEIGHTS, exported.TOKENIZER, exported.SETTINGS])
def test_a_file_that_changed_or_is_missing_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export_model(run_of(tmp_path / "run"), folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load_model(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load_model(folder)


@pytest.mark.parametrize("change", ["no files", "no json", "no model", "a file outside", "newer"])
def test_a_config_that_cannot_be_is_one_line(change: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export_model(run_of(tmp_path / "run"), folder)
    description = json.loads((folder / exported.CONFIG).read_text())
    if change == "no files":
        del description["files"]
    if change == "no model":
        description["model"] = 3
    if change == "a file outside":
        description["files"]["../../etc/passwd"] = "0"
    if change == "newer":
        description["model"]["format_version"] = 99
    (folder / exported.CONFIG).write_text("{" if change == "no json" else json.dumps(description))
    with pytest.raises(ValueError, match=r"config\.json|update dsmr"):
        load_model(folder)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export_model(run_of(tmp_path / "run"), folder)
    tokens = json.loads((folder / exported.TOKENIZER).read_text())
    vocabulary = tokens["vocabulary"]
    vocabulary["NoteOn_0"], vocabulary["NoteOn_1"] = vocabulary["NoteOn_1"], vocabulary["NoteOn_0"]
    (folder / exported.TOKENIZER).write_text(json.dumps(tokens))
    description = json.loads((folder / exported.CONFIG).read_text())
    description["files"][exported.TOKENIZER] = exported.sha256(folder / exported.TOKENIZER)
    (folder / exported.CONFIG).write_text(json.dumps(description))
    with pytest.raises(ValueError, match="392 others"):
        Generator.load(folder)


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", tokenizer={"name": "REMI", "config": {}})
    with pytest.raises(ValueError, match="trained on 392 tokens, the tokenizer REMI"):
        Generator.load(run)
    with pytest.raises(ValueError, match="names no tokenizer"):
        Generator.load(run_of(tmp_path / "other", tokenizer=None))


def test_existing_files_are_kept(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export_model(run, tmp_path / "taken")
    assert (tmp_path / "taken" / "mine.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="no folder"):
        export_model(run, tmp_path / "no" / "model")
    with pytest.raises(ValueError, match="no such run"):
        export_model(tmp_path / "nothing", tmp_path / "model")
    export_model(run, tmp_path / "model")
    with pytest.raises(ValueError, match="exported model already"):
        export_model(tmp_path / "model", tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "run", "taken"]


def test_hub_addresses_are_fetched_and_wrong_ones_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_model(run_of(tmp_path / "run"), tmp_path / "model")
    asked: list[tuple[str, object]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(tmp_path / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_model("hf://someone/model@v2").path == tmp_path / "model"
    load_model("hf://someone/model")
    assert asked == [("someone/model", "v2"), ("someone/model", None)]
    with pytest.raises(ValueError, match="hf://OWNER/NAME"):
        load_model("hf://model")

    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["model"]["backbone"] = "antigravity.Network"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"needs code that is not part of dsmr \(antigravity\.Network\)"):
        load_model("hf://someone/model")
    assert "antigravity" not in sys.modules

    def offline(*given: object, **named: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match="cannot be fetched: no route to host"):
        load_model("hf://someone/model")
