"""The program on data that are not MAESTRO: other tokenizers, other densities, splits without pieces."""

import json
import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from conftest import write_midi
from dsmr.cli import main
from dsmr.cli.lightning_cli import QUIET
from dsmr.data.store import TokenStore
from dsmr.data.workers import WORKER_THRESHOLD
from dsmr.model.horizons import MAESTRO_RATE, TokenRate
from dsmr.results.plotting import common_rate, token_ticks, token_unit
from dsmr.results.run_files import BEST_FILE, LAST_FILE, SECTION, read_checkpoint
from dsmr.results.runs import read_run
from dsmr.share.loading import load_model

SMOKE = ["--config", "smoke", "--trainer.enable_progress_bar", "false", "--data.recall", "null"]
SHORT = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1"]
OWN = """
from miditok import TSD

class Mine(TSD):
    pass
"""


@pytest.fixture(autouse=True)
def lightnings_own_warnings() -> None:
    """Keep the program's own filters inside a test."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)


def dsmr(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def midi(folder: Path, count: int = 6, **settings: object) -> Path:
    for number in range(count):
        write_midi(folder / f"{number}.mid", number, **settings)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def remi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TokenStore, str]:
    """A run on slow pieces in REMI's tokens, the store, and what the run said."""
    root = tmp_path_factory.mktemp("remi")
    options = ["--data.path", midi(root / "midi", tempo=50.0), "--data.tokenizer.name", "REMI"]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("DSMR_CACHE", str(root / "cache"))
        assert dsmr("fit", *SMOKE, *SHORT, "--root", root, "--name", "run", "--sample_every_n_steps", 2, *options) == 0
    (store,) = (root / "cache").glob("REMI-*/")
    return root / "run", TokenStore(store), str(root / "midi")


# Seconds of music


def seconds(store: TokenStore, tokens: int) -> float:
    music = sum(piece.seconds for piece in store.pieces)
    return tokens * music / sum(piece.length - 2 for piece in store.pieces)


def test_horizons_are_told_in_seconds_of_the_music_at_hand(
    remi: tuple[Path, TokenStore, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, store, _ = remi
    long, short = seconds(store, 320), seconds(store, 64)
    assert abs(long - 320 / 39.8) > 2, "no data to tell MAESTRO's seconds apart"
    assert dsmr("validate", "--checkpoint", run, "--trainer.enable_progress_bar=false") == 0
    said = [capsys.readouterr().out]
    assert dsmr("analyze", "--checkpoint", run, "--folder", tmp_path) == 0
    said.append(capsys.readouterr().out)
    slow = midi(tmp_path / "slower", tempo=25.0)
    assert dsmr("validate", "--checkpoint", run, "--trainer.enable_progress_bar=false", "--data.path", slow) == 0
    other = capsys.readouterr().out
    for text, factor in ((said[0], 1), (said[1], 1), (other, 2)):
        assert f"tokens, longest {factor * long:.0f} s of music), rule" in text
        assert re.search(rf" 320 tokens +{factor * long:.1f} s ", text)
        assert re.search(rf" 64 tokens +{factor * short:.1f} s ", text)


def test_a_run_knows_the_tokens_of_a_second_without_its_data(
    remi: tuple[Path, TokenStore, str], tmp_path: Path
) -> None:
    run, store, _ = remi
    for name in (BEST_FILE, LAST_FILE):
        section = read_checkpoint(run / name)[SECTION]
        assert section["tokens_per_second"] == store.tokens_per_second
    assert load_model(run).rate == TokenRate(store.tokens_per_second)
    assert read_run(run).rate == TokenRate(store.tokens_per_second)
    assert dsmr("export", run, tmp_path / "model") == 0
    card = (tmp_path / "model/README.md").read_text()
    assert f"| segment | 64 tokens, about {seconds(store, 64):.0f} s of music |" in card
    assert load_model(tmp_path / "model").rate == TokenRate(store.tokens_per_second)


def older(run: Path, folder: Path, tokenizer: str) -> Path:
    """A run as older versions left it, which does not know its tokens of a second."""
    folder.mkdir()
    for name in ("config.yaml", "metrics.csv"):
        text = (run / name).read_text()
        (folder / name).write_text(text.replace("name: REMI", f"name: {tokenizer}"))
    content = read_checkpoint(run / BEST_FILE)
    del content[SECTION]["tokens_per_second"]
    content[SECTION] |= {"tokenizer": {"name": tokenizer, "config": {}}, "format_version": 2}
    torch.save(content, folder / BEST_FILE)
    return folder


@pytest.mark.parametrize(
    ("tokenizer", "rate", "card"),
    [("performance", MAESTRO_RATE, "64 tokens, about 2 s of music in MAESTRO |"), ("REMI", None, "64 tokens |")],
)
def test_an_older_run_has_maestros_seconds_or_none(
    tokenizer: str, rate: TokenRate | None, card: str, remi: tuple[Path, TokenStore, str], tmp_path: Path
) -> None:
    run = older(remi[0], tmp_path / "old", tokenizer)
    assert load_model(run).rate == rate
    assert read_run(run).rate == rate
    assert dsmr("export", run, tmp_path / "model") == 0
    assert f"| segment | {card}" in (tmp_path / "model/README.md").read_text()
    (run / BEST_FILE).unlink()
    assert read_run(run).rate == rate


def test_an_axis_has_seconds_where_all_that_share_it_have_the_same() -> None:
    rate = TokenRate(20.0)
    assert common_rate([rate, TokenRate(20.0)]) == rate
    assert common_rate([rate, TokenRate(21.0)]) is None
    assert common_rate([rate, None]) is None
    assert token_ticks(rate)(1000.0, None) == "1,000\n50 s"
    assert token_ticks(None)(1000.0, None) == "1,000"
    assert [token_unit(r) for r in (rate, MAESTRO_RATE, None)] == [
        "tokens, and seconds of music",
        "tokens, and seconds of music in MAESTRO",
        "tokens",
    ]


def test_samples_have_the_seconds_of_the_data(
    remi: tuple[Path, TokenStore, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store, folder = remi
    counts = []

    def counted(tokenizer: object, ids: list[int]) -> object:
        counts.append(len(ids) - 1)
        return original(tokenizer, ids)

    from dsmr.generate import samples

    original = samples.decode
    monkeypatch.setattr(samples, "decode", counted)
    options = ["--data.path", folder, "--data.tokenizer.name", "REMI", "--sample_every_n_steps", 1]
    assert dsmr("fit", *SMOKE, *SHORT, "--root", run.parent, "--name", "sampled", *options) == 0
    assert counts == [round(10 * store.tokens_per_second)] * 2


def test_prompts_of_a_split_have_as_many_tokens_as_the_data_have_in_the_seconds(
    remi: tuple[Path, TokenStore, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, store, folder = remi
    read = []

    def noted(generator: object, prompt: object, **given: object) -> object:
        read.append(len(prompt.ids) - 1)  # type: ignore[attr-defined]
        return original(generator, prompt, **given)

    from dsmr.cli import generate_command

    original = generate_command.continuations
    monkeypatch.setattr(generate_command, "continuations", noted)
    options = ["--prompt_seconds", 4, "--seconds", 0.1, "--output", tmp_path / "made"]
    assert dsmr("generate", "--checkpoint", run, "--prompt", "validation", *options) == 0
    assert read == [round(4 * store.tokens_per_second)] * len(store.of_split("validation"))
    assert capsys.readouterr().out.splitlines()[-1] == f"next: dsmr judge {tmp_path / 'made'} --data.path {folder}"


def test_a_bar_of_music_never_leaves_its_ends(remi: tuple[Path, TokenStore, str], tmp_path: Path) -> None:
    prompt = write_midi(tmp_path / "slow.mid", 1, num_notes=150, tempo=50.0)
    options = ["--prompt", prompt, "--prompt_seconds", 20, "--output", tmp_path / "out.mid", "--seconds", 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # tqdm warns where it is told to leave them
        assert dsmr("generate", "--checkpoint", remi[0], *options, "--num", 3) == 0


# The next command


def next_command(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))


def test_preparing_names_a_command_that_trains_on_the_same_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(midi(tmp_path / "my music", 3).parent)
    data = tmp_path / "data.yaml"
    data.write_text(yaml.safe_dump({"data": {"tokenizer": {"name": "REMI", "config": {"num_velocities": 8}}}}))
    given = ["--config", "data.yaml", "--data.path", "my music", "--data.tokenizer.config.num_velocities=4"]
    assert dsmr("prepare", *given, "--data.cache_dir", "my cache", "--output", "result.json") == 0
    kept = ["--config", "data.yaml", "--data.path", "my music", "--data.tokenizer.config.num_velocities=4"]
    command = next_command(capsys)
    assert command == ["dsmr", "fit", "--config", "laptop", *kept, "--data.cache_dir", "my cache"]
    small = ["--config", "smoke", "--data.recall", "null", *SHORT, "--trainer.enable_progress_bar=false"]
    assert dsmr(*command[1:], *small, "--root", tmp_path, "--name", "run") == 0
    assert [path.name for path in Path("my cache").glob("REMI-*/")] == [
        Path(json.loads(Path("result.json").read_text())["store"]).name
    ]


def test_the_next_command_of_preparing_keeps_every_option_that_training_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(midi(tmp_path / "music", 3).parent)
    small = ["--config", "smoke", *SHORT, "--data.recall=null", "--trainer.enable_progress_bar=false"]
    given = ["--data.path", "music", *small, "--seed-everything", 7, "--model.horizons=2x64", "--name", "first"]
    assert dsmr("prepare", "--json", *given, "--output=result.json") == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-2].removeprefix("next: "))
    assert command == ["dsmr", "fit", *map(str, given[:-5]), "--seed_everything", "7", *given[-3:]]
    assert dsmr(*command[1:]) == 0
    kept = yaml.safe_load(Path("runs/first/config.yaml").read_text())
    assert (kept["seed_everything"], kept["model"]["horizons"], kept["data"]["path"]) == (7, "2x64", "music")
    capsys.readouterr()
    assert dsmr("prepare", "--checkpoint", "runs/first", "--data.transpose", 1) == 0
    again = next_command(capsys)
    assert again[2:6] == ["--config", "runs/first/config.yaml", "--data.transpose", "1"]
    assert dsmr(*again[1:]) == 0
    kept = yaml.safe_load(Path("runs/first-again/config.yaml").read_text())
    assert (kept["model"]["horizons"], kept["data"]["transpose"]) == ("2x64", 1)


def test_a_config_that_says_how_to_train_takes_the_laptops_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dsmr("prepare", "--config=smoke", "--data.recall", "null", "--data.path", midi(tmp_path / "m", 2)) == 0
    command = next_command(capsys)
    assert command == ["dsmr", "fit", "--config=smoke", "--data.recall", "null", "--data.path", str(tmp_path / "m")]


def test_the_largest_budget_is_for_the_network_that_was_asked_about(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--config", "laptop", "--device", "rtx-3060-12gb", "--fit-memory", "--data.transpose=0"]
    assert dsmr("estimate", *asked, "--trainer.precision=bf16-mixed", "--model.horizons", "1x512+3x256") == 0
    command = next_command(capsys)
    assert command[:6] == ["dsmr", "fit", "--config", "laptop", "--data.transpose=0", "--trainer.precision"]
    assert command[6:8] == ["bf16-mixed", "--data.num_lanes"]
    assert command[-2] == "--model.horizons"
    assert len(command) == 11


# Splits without pieces


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert dsmr(*arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dsmr: error: ")]
    assert len(errors) == 1
    return errors[0]


def test_a_single_piece_trains_and_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = midi(tmp_path / "midi", 1, num_notes=80), tmp_path / "run"
    assert dsmr("prepare", "--data.path", folder) == 0
    said = capsys.readouterr().out
    assert "1 pieces (1 train)" in said
    assert said.splitlines()[-1].endswith("--trainer.limit_val_batches 0")
    fit = ["fit", *SMOKE, *SHORT, "--data.path", folder, "--root", tmp_path, "--name", "run"]
    assert "or train without validation (--trainer.limit_val_batches 0)" in failed(capsys, *fit)
    assert not run.exists(), "something was left behind"
    assert dsmr(*fit, "--trainer.limit_val_batches", 0) == 0
    said = capsys.readouterr().out
    assert "trained without validation, so there is no best.ckpt; other commands use last.ckpt" in said
    assert said.splitlines()[-1] == f"next: dsmr generate --checkpoint {run} --output music.mid"
    assert (run / "last.ckpt").is_file()
    assert not (run / "best.ckpt").exists()
    assert dsmr("generate", "--checkpoint", run, "--seconds", 1, "--output", tmp_path / "music.mid") == 0
    assert dsmr("fit", "--resume", run, "--trainer.max_steps", 4) == 0
    bar = "--trainer.enable_progress_bar=false"
    for command, split in (("validate", "validation"), ("test", "test")):
        message = failed(capsys, command, "--checkpoint", run, bar)
        assert f"no piece of the {split} split; add files, or give other --data.path" in message
    many = ["--prompt", "validation", "--output", tmp_path / "many"]
    assert "no piece of the validation split" in failed(capsys, "generate", "--checkpoint", run, *many)
    assert "no piece of the validation split" in failed(capsys, "analyze", "--checkpoint", run)
    assert not (run / "analysis").exists()
    (folder / "0.mid").unlink()
    other = write_midi(tmp_path / "other.mid", 5, num_notes=80)
    assert dsmr("analyze", "--checkpoint", run, "--piece", other) == 0


def test_a_run_that_left_out_validation_can_be_validated_after_all(tmp_path: Path) -> None:
    options = ["--data.path", midi(tmp_path / "midi", 4), "--root", tmp_path, "--name", "run"]
    assert dsmr("fit", *SMOKE, *SHORT, *options, "--trainer.limit_val_batches", 0) == 0
    output = tmp_path / "result.json"
    bar = "--trainer.enable_progress_bar=false"
    assert dsmr("validate", "--checkpoint", tmp_path / "run", bar, "--output", output) == 0
    assert json.loads(output.read_text())["partial"] is False


# A tokenizer class of one's own


def test_a_tokenizer_of_ones_own_goes_all_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/my_tokens.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path / "own")
    run, bar = tmp_path / "run", "--trainer.enable_progress_bar=false"
    pieces = midi(tmp_path / "midi", WORKER_THRESHOLD, num_notes=8)
    options = ["--data.path", pieces, "--data.tokenizer.name", "my_tokens.Mine"]
    assert dsmr("fit", *SMOKE, *SHORT, *options, "--root", tmp_path, "--name", "run") == 0
    assert dsmr("validate", "--checkpoint", run, bar) == 0
    assert dsmr("export", run, tmp_path / "model") == 0
    card = (tmp_path / "model/README.md").read_text()
    assert "It needs code that is not part of dsmr: `my_tokens.Mine`" in card
    for checkpoint in (run, tmp_path / "model"):
        assert dsmr("generate", "--checkpoint", checkpoint, "--seconds", 1, "--output", tmp_path / "music.mid") == 0
    monkeypatch.undo()
    forget("my_tokens")
    for command in (
        ["generate", "--checkpoint", run, "--output", tmp_path / "more.mid"],
        ["generate", "--checkpoint", tmp_path / "model", "--output", tmp_path / "more.mid"],
        ["validate", "--checkpoint", run],
        ["export", run, tmp_path / "again"],
        ["prepare", *options],
    ):
        assert "my_tokens.Mine cannot be imported" in failed(capsys, *command)
    assert not (tmp_path / "more.mid").exists()
    assert not (tmp_path / "again").exists()


def forget(module: str) -> None:
    """Let a module be looked for again, as in a new process."""
    import sys

    from dsmr.data import tokenizer

    sys.modules.pop(module)
    tokenizer._build.cache_clear()
