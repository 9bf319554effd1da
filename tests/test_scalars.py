"""What a person types as a name arrives as typed, and what is a number stays one."""

import copy
import pickle
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Union, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dsmr.cli.lightning_cli import DsmrCLI
from dsmr.cli.parser import OneLineParser
from dsmr.cli.type_words import type_words
from dsmr.cli.yaml_values import WrittenFloat, WrittenInt, as_written, dump_yaml, load_yaml, plain_values
from test_cli import SMOKE, dsmr, lightnings_own_warnings  # noqa: F401 (fixture)

NAMES = ["2024", "1e3", "1.10", "1_000", "0x1f", "0o17", "010", "12:30", "1:00:00", ".5", "+3", "-7", "1e-3", "1.e3"]
NAMES += [".inf", ".nan", "yes", "No", "on", "Off", "True", "TRUE", "true", "false", "2024-01-01", "1-2", "a-b.c", "7"]


class Parsed(DsmrCLI):
    """Settings alone, of which nothing is made."""

    def instantiate_classes(self) -> None:
        """Make nothing."""


def config(tmp_path: Path, text: str, *options: str) -> Any:
    """Settings of the smoke config with those of a text over it."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    given = ["--config=smoke", f"--config={path}", f"--root={tmp_path / 'runs'}", *options]
    return Parsed("fit", given).config


@pytest.mark.parametrize("name", NAMES)
def test_a_name_arrives_as_it_is_typed(name: str, tmp_path: Path) -> None:
    logger = "trainer: {logger: {class_path: WandbLogger, init_args: {name: %s, project: %s}}}"
    text = f"name: {name}\ndata: {{recall: null, path: {name}}}\n{logger % (name, name)}\n"
    read = config(tmp_path, text)
    typed = config(
        tmp_path,
        "",
        f"--name={name}",
        f"--data.path={name}",
        "--data.recall=null",
        "--trainer.logger=WandbLogger",
        f"--trainer.logger.name={name}",
        f"--trainer.logger.init_args.project={name}",
    )
    for found in (read, typed):
        arguments = found.trainer.logger.init_args
        assert [found.name, found.data.path, arguments.name, arguments.project] == [name] * 4
        assert type(found.name) is str


@pytest.mark.parametrize("name", NAMES)
def test_settings_that_are_written_are_read_back_as_they_were(name: str, tmp_path: Path) -> None:
    cli = Parsed("fit", ["--config=smoke", f"--root={tmp_path}", f"--name={name}", f"--data.cache_dir={name}"])
    written = cli.parser.dump(cli.config)
    again = config(tmp_path, written, "--trainer.logger=null")
    assert (again.name, again.data.cache_dir) == (name, name)
    assert again.trainer.as_dict() == cli.config.trainer.as_dict()


def test_a_run_with_a_number_for_a_name_resumes(tmp_path: Path) -> None:
    assert dsmr("fit", *SMOKE, "--root", tmp_path, "--name", "1e3", "--trainer.max_steps=1") == 0
    config_file = tmp_path / "1e3/config.yaml"
    assert yaml.safe_load(config_file.read_text())["name"] == "1e3"
    config_file.write_text(config_file.read_text().replace("name: '1e3'", "name: 1e3"))  # as it was once written
    assert "name: 1e3" in config_file.read_text()
    assert dsmr("fit", "--resume", tmp_path / "1e3", "--trainer.max_steps=2") == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["1e3"]


def test_numbers_stay_numbers(tmp_path: Path) -> None:
    text = """
trainer: {max_steps: 20, gradient_clip_val: 1e0, limit_val_batches: 1.0, enable_progress_bar: off, fast_dev_run: no}
model: {optimizer: {class_path: AdamW, init_args: {lr: 3e-4, betas: [0.9, 0.95], weight_decay: 1}}}
data: {num_lanes: 4, recall: {distances: [64, 128]}}
seed_everything: 7
"""
    settings = config(tmp_path, text.replace("AdamW", "dsmr.training.AdamW"))
    trainer, optimizer = settings.trainer, settings.model.optimizer.init_args
    assert (trainer.max_steps, type(trainer.max_steps)) == (20, int)
    assert (trainer.gradient_clip_val, type(trainer.gradient_clip_val)) == (1.0, float)
    assert (trainer.enable_progress_bar, trainer.fast_dev_run) == (False, False)
    assert (optimizer.lr, type(optimizer.lr)) == (3e-4, float)
    assert list(optimizer.betas) == [0.9, 0.95]
    assert {type(value) for value in optimizer.betas} == {float}
    assert (optimizer.weight_decay, type(optimizer.weight_decay)) == (1.0, float)
    assert (settings.seed_everything, type(settings.seed_everything)) == (7, int)
    distances = settings.data.recall.distances
    assert [(value, type(value)) for value in distances] == [(64, int), (128, int)]


def test_horizons_and_folders_that_look_like_numbers_are_text(tmp_path: Path) -> None:
    checkpoint = "{class_path: ModelCheckpoint, init_args: {dirpath: 2024, filename: 1.10, save_top_k: 3}}"
    settings = config(tmp_path, f"model: {{horizons: 512}}\nroot: 1e3\ntrainer: {{callbacks: [{checkpoint}]}}\n")
    arguments = settings.trainer.callbacks[0].init_args
    assert settings.model.horizons == "512"
    assert (arguments.dirpath, arguments.filename, arguments.save_top_k) == ("2024", "1.10", 3)
    typed = config(tmp_path, "", "--model.horizons=512", f"--trainer.callbacks=[{checkpoint}]", "--root=7")
    assert (typed.model.horizons, typed.root) == ("512", str(tmp_path / "runs")[:0] + "7")
    assert typed.trainer.callbacks[0].init_args.filename == "1.10"


def test_text_that_begins_like_a_comment_is_a_name(tmp_path: Path) -> None:
    assert config(tmp_path, "name: '#1'\n").name == "#1"
    assert config(tmp_path, "name: null\n").name.startswith("1x320+1x64-")


def test_a_checkpoint_that_looks_like_a_number_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("checkpoint: 1e3\noutput: a.mid\n")
    assert dsmr("generate", "--config=mine.yaml") == 2
    assert "checkpoint 1e3: no such run" in capsys.readouterr().err


KINDS: list[tuple[str, Any, Any]] = [
    ("1e3", str, "1e3"),
    ("1e3", float, 1000.0),
    ("2024", str | None, "2024"),
    ("2024", int | str, 2024),
    ("1.10", int | str, "1.10"),
    ("1.10", float | str | None, 1.1),
    ("yes", str, "yes"),
    ("yes", bool, True),
    ("off", bool | str, False),
    ("true", str, "true"),
    ("true", bool | None, True),
    ("null", str | None, None),
    ("[1.10, 2, a]", list[str], ["1.10", "2", "a"]),
    ("[1.10, 2]", list[float], [1.1, 2]),
    ("[1.10, 2]", tuple[str, ...], ["1.10", "2"]),
    ("{a: 1.10, b: 007}", dict[str, str], {"a": "1.10", "b": "007"}),
    ("{a: 1.10}", dict[str, Any], {"a": 1.1}),
    ("{1: 2}", dict[int, int], {1: 2}),
    ("16", Literal["16", "32"], "16"),
    ("16", Literal[16, 32], 16),
    ("2.5", Path | str, "2.5"),
    ("3", Any, 3),
]


@pytest.mark.parametrize(("text", "kind", "expected"), KINDS)
def test_a_type_decides_between_a_number_and_its_text(text: str, kind: Any, expected: Any) -> None:
    found = plain_values(as_written(load_yaml(text), kind))
    assert found == expected
    assert type(found) is type(expected)


PRINTED = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]))


@given(st.recursive(PRINTED | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False), st.lists))
def test_whatever_is_dumped_is_loaded_again(value: Any) -> None:
    assert plain_values(load_yaml(dump_yaml(value))) == value


@given(st.text(alphabet="0123456789.eE+-_:xonyNOYtrueaf~#", min_size=1, max_size=8))
def test_a_string_that_is_dumped_is_loaded_as_that_string(text: str) -> None:
    assert load_yaml(dump_yaml({"name": text})) == {"name": text}
    assert type(load_yaml(dump_yaml({"name": text}))["name"]) is str


def test_written_numbers_are_numbers_in_every_other_respect() -> None:
    integer, number = WrittenInt(1000, "1_000"), WrittenFloat(1000.0, "1e3")
    assert integer == 1000 == number
    assert hash(integer) == hash(1000)
    for value in (integer, number):
        for twin in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
            assert (twin, twin.text) == (value, value.text)
        assert load_yaml(dump_yaml([value])) == [value]
        assert load_yaml(dump_yaml([value]))[0].text == value.text


WORDS: list[tuple[Any, str]] = [
    (int, "an integer"),
    (int | float | None, "a number or null"),
    (str | None, "a string or null"),
    (list[int] | str | int, "a string, an integer or a list of such"),
    (dict[str, int] | timedelta, "a mapping or a duration such as 0:02:00"),
    (Literal["a", 3, "3"], "'a' or 3"),
    (tuple[int, str], "a list of 2 (an integer, a string)"),
    (list[str], "a list (each item a string)"),
    (list, "a list"),
    (bool, "true or false"),
]


@pytest.mark.parametrize(("kind", "expected"), WORDS)
def test_a_type_is_said_in_words(kind: Any, expected: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type_words(kind) == expected


@pytest.mark.parametrize(("given", "wanted"), [("1", 1), ("0.5", 0.5), ("1.0", 1.0), ("null", None), ("-1", -1)])
def test_a_whole_number_stays_whole_in_a_union_that_has_float_first(given: str, wanted: object) -> None:
    # as Lightning's limit_val_batches, depending on what was imported before
    parser = OneLineParser(exit_on_error=False)
    kind = Union[float, int, None]  # noqa: UP007
    assert get_args(kind)[0] is float
    parser.add_argument("--limit", type=kind)
    value = parser.parse_args(["--limit", given]).limit
    assert (value, type(value)) == (wanted, type(wanted))


def test_a_fit_reads_whole_numbers_of_batches() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "dsmr", "fit", "--config", "smoke", "--print_config"]
    for number in ("1", "0.5"):
        options = ["--trainer.limit_val_batches", number]
        ended = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert f"  limit_val_batches: {number}\n" in ended.stdout, ended.stderr
