"""The program: runs from fit to generate, and mistakes of one line each."""

import csv
import errno
import importlib
import json
import os
import shutil
import warnings
import wave
from pathlib import Path

import numpy as np
import pytest
import yaml
from jsonargparse import Namespace
from symusic import Note, Score, Track

from conftest import write_midi
from dsmr.cli import main
from dsmr.cli.config_files import find_config, shipped
from dsmr.cli.lightning_cli import QUIET
from dsmr.cli.run_folder import continue_wandb
from dsmr.cli.yaml_values import current_path, load_yaml
from dsmr.generate.audio import find_sound_font, render_audio
from dsmr.results.run_files import read_checkpoint
from dsmr.training.csv_logger import MetricsLogger, read_metrics

SMOKE = ["--config", "smoke", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(autouse=True)
def lightnings_own_warnings() -> None:
    """Keep the program's own filters inside a test."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)


def dsmr(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the smoke config."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("DSMR_CACHE", str(root / "cache"))
        assert dsmr("fit", *SMOKE, "--root", root, "--name", "smoke") == 0
    return root / "smoke"


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_is_a_folder_with_config_checkpoints_and_metrics(smoke_run: Path) -> None:
    names = {"config.yaml", "run.json", "best.ckpt", "last.ckpt", "metrics.csv", "pieces.csv"}
    assert {p.name for p in smoke_run.iterdir()} == names
    config = yaml.safe_load((smoke_run / "config.yaml").read_text())
    assert config["model"]["horizons"] == "1x320+1x64"
    validated = [row for row in rows(smoke_run) if row["val/perplexity"]]
    assert [int(row["step"]) for row in validated] == [9, 19]


def test_validation_of_the_best_checkpoint_repeats_the_figures_of_the_run(smoke_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    assert dsmr("validate", "--checkpoint", smoke_run, "--output", output, "--trainer.enable_progress_bar=false") == 0
    result = json.loads(output.read_text())
    best = min(float(row["val/perplexity"]) for row in rows(smoke_run) if row["val/perplexity"])
    assert result["metrics"]["val/perplexity"] == best
    assert result["partial"] is False


def test_json_is_one_document_on_the_last_line(smoke_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dsmr("test", "--checkpoint", smoke_run, "--json", "--trainer.enable_progress_bar=false") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["split"] == "test"
    assert result["horizons"] == [320, 64]
    assert result["metrics"]["test/perplexity"] > 1


def test_horizons_can_be_changed_when_validating(
    smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = [tmp_path / "0.json", tmp_path / "1.json"]
    for output, horizons in zip(outputs, ("2x0", "2x512"), strict=True):
        assert dsmr(
            "validate", "--checkpoint", smoke_run, "--model.horizons", horizons, "--output", output,
            "--trainer.enable_progress_bar=false",
        ) == 0  # fmt: skip
    results = [json.loads(output.read_text()) for output in outputs]
    assert [result["horizons"] for result in results] == [[0, 0], [512, 512]]
    assert results[0]["metrics"]["val/nll"] != results[1]["metrics"]["val/nll"]
    assert "horizons 2x0" in capsys.readouterr().out


def test_horizons_can_be_changed_when_generating(smoke_run: Path, tmp_path: Path) -> None:
    outputs = {name: tmp_path / f"{name}.mid" for name in ("2x0", "1x320+1x64", "2x512")}
    for horizons, output in outputs.items():
        options = ["--seconds", 40, "--horizons", horizons, "--output", output]
        assert dsmr("generate", "--checkpoint", smoke_run, *options) == 0
    plain = tmp_path / "plain.mid"
    assert dsmr("generate", "--checkpoint", smoke_run, "--seconds", 40, "--output", plain) == 0
    assert plain.read_bytes() == outputs["1x320+1x64"].read_bytes()
    assert plain.read_bytes() != outputs["2x0"].read_bytes()


def test_a_model_is_announced_with_a_picture_of_its_horizons(
    smoke_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dsmr("validate", "--checkpoint", smoke_run, "--trainer.enable_progress_bar=false") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("horizons 1x320+1x64 (budget 384 tokens")
    assert ["64 tokens" in lines[1], "320 tokens" in lines[2]] == [True, True]
    assert [line.count("\u2588") for line in lines[1:3]] == [6, 32]  # 64 of 320 tokens are 6.4 of 32 blocks


def test_a_run_goes_on_without_another_flag_and_its_metrics_have_no_gap(smoke_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "smoke"
    shutil.copytree(smoke_run, run)
    with (run / "metrics.csv").open("a") as file:
        file.write("0,24" + "," * (len(rows(run)[0]) - 2) + "\n")
    assert dsmr("fit", "--resume", run, "--trainer.max_steps", "30", "--trainer.enable_progress_bar=false") == 0
    trained = [int(row["step"]) for row in rows(run) if row["train/nll"]]
    assert trained == [4, 9, 14, 19, 24, 29]
    assert [int(row["step"]) for row in rows(run) if row["val/perplexity"]] == [9, 19, 29]
    before = rows(smoke_run)
    assert rows(run)[: len(before)] == before


def test_a_run_whose_time_is_over_saves_and_leaves_without_a_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [
        "--trainer.max_steps",
        "100000",
        "--trainer.val_check_interval",
        "100000",
        "--trainer.max_time",
        "00:00:00:01",
    ]
    assert dsmr("fit", *SMOKE, *long, "--root", tmp_path, "--name", "short") == 0
    assert "(trainer.max_time is over); saved" in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "short/last.ckpt")["global_step"] > 0
    assert not (tmp_path / "short/best.ckpt").exists()


def test_a_run_that_never_saved_is_begun_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost/config.yaml").write_text("trainer: {}\n")
    (tmp_path / "lost/metrics.csv").write_text("epoch,step,train/nll\n0,4,1.0\n")
    assert dsmr("fit", "--resume", tmp_path / "lost") == 2
    assert "start it again with dsmr fit --name lost" in capsys.readouterr().err
    assert dsmr("fit", *SMOKE, "--trainer.max_steps", "5", "--root", tmp_path, "--name", "lost") == 0
    with (tmp_path / "lost/metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["4"]


def test_a_line_of_metrics_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/nll\r\n0,4,1.5\r\n0,9,1.2\r\n0,1")
    rows, columns = read_metrics(path)
    assert [row["step"] for row in rows] == ["4", "9"]
    assert columns == ["epoch", "step", "train/nll"]
    logger = MetricsLogger(tmp_path, 1)
    logger.log_metrics({"val/nll": 1.0}, step=4)
    logger.save()
    rows, columns = read_metrics(path)
    assert [(row["step"], row["train/nll"], row["val/nll"]) for row in rows] == [("4", "1.5", ""), ("4", "", "1.0")]
    assert logger.num_rows == 2


def test_a_run_of_wandb_has_an_identity_that_its_config_keeps() -> None:
    def given(number: str | None) -> Namespace:
        settings = Namespace(id=number, name=None, resume=None)
        return Namespace(class_path="lightning.pytorch.loggers.WandbLogger", init_args=settings)

    fresh, old = given(None), given("abc")
    for loggers in (fresh, [old], None):
        continue_wandb(loggers, "run")
    assert len(fresh.init_args.id) == 12
    assert (fresh.init_args.name, fresh.init_args.resume) == ("run", "allow")
    assert old.init_args.id == "abc"


def test_generated_music_is_a_midi_file_and_repeats_with_its_seed(smoke_run: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output = tmp_path / f"{name}.mid"
        options = ["--seconds", 3, "--seed", seed, "--output", output]
        assert dsmr("generate", "--checkpoint", smoke_run, *options) == 0
    a, b, c = ((tmp_path / f"{name}.mid").read_bytes() for name in "abc")
    assert a == b != c
    assert Score(tmp_path / "a.mid").note_num() > 0


def test_a_folder_of_midi_is_prepared_with_a_report(midi_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (midi_folder / "broken.mid").write_bytes(b"x")
    assert dsmr("prepare", "--data.path", midi_folder, "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("refused broken.mid: not a MIDI file") for line in lines)
    assert sum(json.loads(lines[-1])["pieces"].values()) == 12


def test_configs_are_found_by_name() -> None:
    assert find_config("two_scale") == find_config("horizons/two_scale")
    assert {"base", "smoke", "laptop", "recall"} <= set(shipped())


@pytest.fixture(scope="module")
def exported_model(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke run as a folder to hand on."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert dsmr("export", smoke_run, folder) == 0
    return folder


def test_an_exported_model_validates_as_its_run_did(smoke_run: Path, exported_model: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "run.json", tmp_path / "model.json"]
    for checkpoint, output in zip((smoke_run, exported_model), outputs, strict=True):
        options = ["--output", output, "--trainer.enable_progress_bar=false"]
        assert dsmr("validate", "--checkpoint", checkpoint, *options) == 0
    results = [json.loads(output.read_text())["metrics"] for output in outputs]
    assert results[0] == results[1]
    card = (exported_model / "README.md").read_text()
    assert f"| {results[0]['val/nll']:.4f} | {results[0]['val/perplexity']:.4f} |" in card
    assert "license: apache-2.0" in card


def test_continuations_of_a_prompt_have_sound_and_picture(
    exported_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, output = write_midi(tmp_path / "in.mid", 3), tmp_path / "out.mid"
    script = "#!/bin/sh\nfor last; do :; done\nwhile [ $1 != -F ]; do shift; done\nprintf RIFF > $2\ncat $last >> $2\n"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "fluidsynth").write_text(script)
    (tmp_path / "bin" / "fluidsynth").chmod(0o755)
    (tmp_path / "font.sf2").write_bytes(b"a font")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    options = ["--prompt-seconds", 4, "--seconds", 2, "--num", 2, "--seed", 5, "--top-k", 50, "--min-p=0.01"]
    options += ["--picture", "--audio", "--sound-font", tmp_path / "font.sf2", "--json"]
    arguments = ["generate", "--checkpoint", exported_model, "--prompt", prompt, "--output", output, *options]
    assert dsmr(*arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for number, piece in enumerate(result["pieces"], start=1):
        assert piece["output"] == str(tmp_path / f"out-{number}.mid")
        score = Score.from_midi(Path(piece["output"]).read_bytes()).to("second")
        assert [marker.time for marker in score.markers] == pytest.approx([4.0], abs=1e-3)
        assert sum(note.time >= 4 - 1e-3 for note in score.tracks[0].notes) == piece["notes"]
        assert Path(piece["picture"]).read_bytes().startswith(b"\x89PNG")
        assert Path(piece["audio"]).read_bytes() == b"RIFF" + Path(piece["output"]).read_bytes()
    single = tmp_path / "single.mid"
    alone = [*arguments[:6], single, *options[:5], 1, "--seed", 6, *options[8:11]]
    assert dsmr(*alone) == 0
    assert single.read_bytes() == (tmp_path / "out-2.mid").read_bytes()


def test_every_piece_of_a_split_is_continued(
    smoke_run: Path, midi_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--checkpoint", smoke_run, "--seconds", 3, "--prompt-seconds", 5, "--num", 2]
    options = ["--prompt", "validation", "--limit", 2, "--output", tmp_path / "made", "--json"]
    assert dsmr(*arguments, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"next: dsmr judge {tmp_path / 'made'}"
    paths = sorted((tmp_path / "made").iterdir())
    result = json.loads(lines[-1])
    assert [piece["output"] for piece in result["pieces"]] == [str(path) for path in paths]
    assert (result["folder"], result["num"], len(paths)) == (str(tmp_path / "made"), 4, 4)
    scores = [Score.from_midi(path.read_bytes()).to("second") for path in paths]
    assert [score.markers[0].time for score in scores] == pytest.approx([5.0] * 4, abs=1e-3)
    before = [[(n.time, n.pitch) for n in score.tracks[0].notes if n.time < 5 - 1e-3] for score in scores]
    assert before[0] == before[1] != before[2] == before[3]
    assert all(score.end() <= 8 + 1e-3 for score in scores)
    single = [*arguments[:7], "--prompt", "validation", "--output", tmp_path / "one", "--seed", 1]
    assert dsmr(*single, "--data.validation-stride", 2, "--limit", 1) == 0
    (alone,) = (tmp_path / "one").iterdir()
    assert alone.read_bytes() == paths[1].read_bytes()
    judge = ["judge", tmp_path / "made", "--data.path", midi_folder, "--split", "train", "--window", 1, "--json"]
    capsys.readouterr()
    assert dsmr(*judge, "--output", tmp_path / "judged") == 0
    judged = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert judged["start"] == pytest.approx(5.0), "generated music is judged from its prompt's end on"
    assert judged["rows"][str(tmp_path / "made")]["pieces"] == 4


def test_every_file_of_a_folder_is_continued(
    exported_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("a/same.mid", "b/same.mid", "c.mid", "short.mid")):
        write_midi(tmp_path / "in" / name, number, num_notes=6 if name == "short.mid" else 60)
    (tmp_path / "in" / "broken.mid").write_bytes(b"MThd and no more")
    arguments = ["generate", "--checkpoint", exported_model, "--seconds", 2, "--prompt-seconds", 4]
    folder = tmp_path / "out" / "deep"
    assert dsmr(*arguments, "--prompt", tmp_path / "in", "--output", folder, "--json") == 0
    out = capsys.readouterr().out
    assert "not continued: broken.mid: " in out
    assert set(json.loads(out.splitlines()[-1])["refused"]) == {"broken.mid"}
    assert {path.name for path in folder.iterdir()} == {"a-same.mid", "b-same.mid", "c.mid", "short.mid"}
    assert dsmr(*arguments, "--prompt", tmp_path / "in" / "c.mid", "--output", tmp_path / "c.mid") == 0
    write_midi(tmp_path / "in" / "c.midi", 9)
    assert dsmr(*arguments, "--prompt", tmp_path / "in", "--output", tmp_path / "other") == 2
    assert "c.mid; give them different names" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert (tmp_path / "c.mid").read_bytes() == (folder / "c.mid").read_bytes()


@pytest.mark.skipif(shutil.which("fluidsynth") is None, reason="FluidSynth is not installed: nothing can be rendered")
def test_real_sound_is_rendered_and_not_silent(smoke_run: Path, tmp_path: Path) -> None:
    try:
        font = find_sound_font()
    except ValueError:
        pytest.skip("no General MIDI sound font is installed")
    midi, audio = write_midi(tmp_path / "in.mid", 1), tmp_path / "out.wav"
    render_audio(midi, audio, font)
    with wave.open(str(audio)) as sound:
        assert (sound.getframerate(), sound.getnchannels()) == (44_100, 2)
        seconds = sound.getnframes() / 44_100
        samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16)
    assert seconds >= Score.from_midi(midi.read_bytes()).to("second").end()
    assert np.abs(samples.astype(np.int64)).max() > 500
    with pytest.raises(ValueError, match="could not write"):
        render_audio(tmp_path / "nothing.mid", tmp_path / "none.wav", font)
    assert not (tmp_path / "none.wav").exists()


GENERATE_MISTAKES = {
    "the prompt itself": (["--prompt", "good.mid", "--output", "good.mid"], "good.mid is the prompt itself"),
    "zero seconds": (["--seconds", 0], "--seconds is 0"),
    "no pieces": (["--num", 0], "--num is 0"),
    "no temperature": (["--temperature", 0], "temperature is 0"),
    "no mass": (["--top-p", 0], "top_p is 0"),
    "less than no tokens": (["--top-k", -3], "top_k is -3"),
    "an unknown option": (["--temprature", 1], "did you mean temperature?"),
    "a folder without music": (["--prompt", "folder.mid", "--output", "out"], "holds no MIDI file"),
    "a file for many pieces": (["--prompt", "train"], "name a folder"),
    "the folder of the prompts": (
        ["--prompt", "folder.mid", "--output", "folder.mid"],
        "is the folder of the prompts",
    ),
    "a limit of one prompt": (["--prompt", "good.mid", "--limit", 3], "--limit is the number of pieces"),
    "data of no split": (["--data.path", "x"], "add --prompt train or validation or test"),
    "data that are missing": (["--prompt", "test", "--data.path", "no", "--output", "out"], "no does not exist"),
    "a prompt that is missing": (["--prompt", "nowhere.mid"], "nowhere.mid cannot be read"),
    "a prompt that is none": (["--prompt", "garbage.mid"], "not a MIDI file"),
    "an empty prompt": (["--prompt", "empty.mid"], "no notes"),
    "drums": (["--prompt", "drums.mid"], "found drums"),
    "a prompt of no seconds": (["--prompt", "good.mid", "--prompt-seconds", 0], "prompt_seconds is 0"),
    "seconds of no prompt": (["--prompt-seconds", 3], "give one"),
    "an output that is no MIDI file": (["--output", "out.wav"], "end with .mid"),
    "an output that is a folder": (["--output", "folder.mid"], "is a folder"),
    "horizons of other layers": (["--horizons", "9x64"], "9"),
    "an unknown device": (["--device", "tpux"], "--device tpux"),
    "a sound font that is missing": (["--audio", "--sound-font", "no.sf2"], "sound font no.sf2"),
}


@pytest.mark.parametrize("mistake", GENERATE_MISTAKES)
def test_a_mistake_in_generating_is_one_line_and_writes_nothing(
    mistake: str, smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    write_midi(tmp_path / "good.mid", 0)
    (tmp_path / "garbage.mid").write_bytes(b"MThd or so")
    (tmp_path / "folder.mid").mkdir()
    Score(480).dump_midi(tmp_path / "empty.mid")
    drums = Score(480)
    drums.tracks.append(Track("", 0, True))
    drums.tracks[0].notes.append(Note(0, 100, 36, 80))
    drums.dump_midi(tmp_path / "drums.mid")
    before = sorted(tmp_path.iterdir())
    options, expected = GENERATE_MISTAKES[mistake]
    output = [] if "--output" in options else ["--output", "out.mid"]
    assert dsmr("generate", "--checkpoint", smoke_run, *output, *options) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(error) == 1
    assert expected in error[0]
    assert sorted(tmp_path.iterdir()) == before


def test_missing_programs_are_named_before_anything_is_made(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    options = ["--output", tmp_path / "out.mid", "--audio"]
    assert dsmr("generate", "--checkpoint", smoke_run, *options) == 2
    assert "apt install fluidsynth" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr("dsmr.generate.audio.FOLDERS", ())
    monkeypatch.delenv("DSMR_SOUND_FONT", raising=False)
    assert dsmr("generate", "--checkpoint", smoke_run, *options) == 2
    assert "DSMR_SOUND_FONT" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


MISTAKES = {
    "an unknown command": (["fitt"], "did you mean fit?"),
    "an unknown key": (["fit", "--model.horizon=3"], "did you mean model.horizons?"),
    "a name that is none": (["fit", "--config=smoke", "--name="], "--name '' must be the name of one folder"),
    "a name that leads elsewhere": (["fit", "--config=smoke", "--name=../up"], "must be the name of one folder"),
    "no accumulation": (
        ["fit", "--config=smoke", "--trainer.accumulate_grad_batches=0"],
        "trainer.accumulate_grad_batches is 0; it must be at least 1",
    ),
    "a folder that generated pieces do not read": (
        ["fit", "--config=smoke", "--data.path=music"],
        "data.recall generates pieces and would ignore data.path music; set data.recall to null",
    ),
    "an unknown trainer key": (["fit", "--trainer.max_epoch=3"], "did you mean trainer.max_epochs?"),
    "an unknown key of the network": (["fit", "--model.backbone.num_layer=3"], "did you mean num_layers?"),
    "an unknown key of a schedule": (
        ["fit", "--model.horizons=TwoScale", "--model.horizons.lng=3"],
        "mean long?",
    ),
    "an unknown config": (["fit", "--config", "smok"], "did you mean smoke?"),
    "a wrong type": (["fit", "--data.num_lanes=x"], "data.num_lanes"),
    "a value out of range": (["fit", "--config=smoke", "--data.num_lanes=0"], "data.num_lanes is 0"),
    "no spelling of horizons": (["fit", "--config=smoke", "--model.horizons=abc"], "2x3584+10x512"),
    "horizons of other layers": (["fit", "--config=smoke", "--model.horizons=3x64"], "for example, 2x64"),
    "horizons off the block": (["fit", "--config=smoke", "--model.horizons=2x70"], "use 64 or 128"),
    "no checkpoint": (["validate"], "give --checkpoint RUN"),
    "a missing checkpoint": (["validate", "--checkpoint", "nowhere"], "no such run"),
    "a missing run": (["fit", "--resume", "nowhere"], "no such run"),
    "a missing path": (["prepare", "--data.path", "nowhere"], "does not exist"),
    "a missing option": (["generate", "--checkpoint", "nowhere"], "output"),
    "a missing output folder": (["generate", "--checkpoint", "x", "--output", "no/x.mid"], "no folder no"),
    "an output folder that is missing": (["prepare", "--output", "no/x.json", "--config", "smoke"], "no folder no"),
    "another name for a resumed run": (["fit", "--resume", "a", "--name", "b"], "leave out --name"),
    "two runs at once": (["fit", "--resume", "a", "--checkpoint", "b"], "only one of"),
    "a run given twice": (["fit", "--resume", "a", "--resume", "b"], "given twice"),
    "a schedule of layers that are not there": (
        ["fit", "--config=smoke", "--model.horizons=Binary", "--model.horizons.layers=[0,2]"],
        "layers [0, 2] must be different numbers from 0",
    ),
    "a schedule of too many layers": (["fit", "--config=smoke", "--model.horizons=Binary"], "give 0 to 2"),
    "an unknown growth": (["fit", "--model.horizons=Ascending", "--model.horizons.growth=cubic"], "'geometric'"),
    "an unknown schedule": (["fit", "--model.horizons=Pyramid"], "horizons"),
    "a budget that cannot be spent": (
        [
            "fit",
            "--config=smoke",
            "--model.horizons=Fitted",
            "--model.horizons.schedule=Uniform",
            "--model.horizons.budget=1000",
        ],
        "it can spend 768 or 1024",
    ),
    "a budget off the network's block": (
        [
            "fit",
            "--config=smoke",
            "--model.horizons={class_path: Fitted, init_args: {schedule: {class_path: Uniform}, "
            "budget: 96, block: 16}}",
        ],
        "use 0 or 64",
    ),
    "an unknown rule": (["fit", "--model.backbone.rule=slide"], "boundary, sliding"),
    "a network without horizons that is given some": (
        ["fit", "--config=smoke", "--config=perceiver_ar", "--model.horizons=2x64"],
        "set model.horizons to null",
    ),
    "a network with horizons that is given none": (
        ["fit", "--config=smoke", "--model.horizons=null"],
        "set model.horizons",
    ),
    "windows that read no memory": (
        [
            "fit",
            "--config=smoke",
            "--config=windowed",
            "--model.horizons=2x128",
            "--trainer.enable_progress_bar=false",
        ],
        "set model.horizons to 2x0",
    ),
    "windows shorter than their stride": (
        ["fit", "--config=smoke", "--config=windowed", "--data.segment_length=256"],
        "stride 512 exceeds data.segment_length 256",
    ),
    "an unknown protocol": (["fit", "--config=windowed", "--data.windows.protocol=all"], "'random'"),
    "heads that are none": (["fit", "--config=smoke", "--model.backbone.num_heads=0"], "num_heads 0"),
    "an unknown tokenizer": (["prepare", "--data.tokenizer.name", "Remi"], "known: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, expected = MISTAKES[mistake]
    assert main(arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(error) == 1
    assert error[0].startswith("dsmr: error: ")
    assert expected in error[0]
    assert len(error[0]) < 400
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_no_data_names_the_environment_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DSMR_MAESTRO", raising=False)
    assert dsmr("prepare") == 2
    assert "DSMR_MAESTRO" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert dsmr("prepare", "--data.path", tmp_path / "empty") == 2
    assert "no MIDI file" in capsys.readouterr().err


def test_a_wrong_config_file_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {
        "unknown.yaml": ("model:\n  horizon: 2x64\n", "unknown.yaml, line 2); did you mean model.horizons?"),
        "twice.yaml": (
            "data: {seed: 1}\nmodel: {}\ndata: {seed: 2}\n",
            "twice.yaml, line 3: the key data is given twice",
        ),
        "resume.yaml": ("resume: runs/nowhere\n", "on the command line, not in a config file"),
        "broken.yaml": ("model:\n  - a: [\n", "broken.yaml, line 3"),
    }
    for name, (text, expected) in texts.items():
        (tmp_path / name).write_text(text)
        assert dsmr("fit", "--config", "smoke", "--config", tmp_path / name) == 2
        assert expected in capsys.readouterr().err


def test_a_run_is_never_overwritten(smoke_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (smoke_run / "last.ckpt").read_bytes()
    assert dsmr("fit", *SMOKE, "--root", smoke_run.parent, "--name", smoke_run.name) == 2
    assert f"--resume {smoke_run}" in capsys.readouterr().err
    assert (smoke_run / "last.ckpt").read_bytes() == before


def test_the_best_checkpoint_says_that_it_cannot_resume(smoke_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dsmr("fit", "--ckpt_path", smoke_run / "best.ckpt") == 2
    assert "cannot resume" in capsys.readouterr().err


def test_another_stream_is_refused_by_name_on_resume(smoke_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key, value in (("data.num_lanes", "2"), ("data.segment_length", "128"), ("model.horizons", "2x64")):
        assert dsmr("fit", "--resume", smoke_run, f"--{key}", value, "--trainer.max_steps", "30") == 2
        assert key.partition(".")[2] in capsys.readouterr().err


def test_help_lists_the_commands_and_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "prepare" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--help"])
    assert stopped.value.code == 0
    assert "--model.horizons" in capsys.readouterr().out


def test_a_setting_that_torch_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--root", tmp_path, "--name", "lost", "--model.optimizer.lr=-1"]
    assert dsmr("fit", *SMOKE, *options) == 2
    assert "dsmr: error: model.optimizer: Invalid learning rate: -1.0" in capsys.readouterr().err


def test_a_disk_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "there/README.md")

    monkeypatch.setattr("dsmr.cli.report_command.collect_results", full)
    assert dsmr("report", tmp_path) == 2
    expected = (
        "dsmr: error: cannot write there/README.md (No space left on device): make room, or choose another folder"
    )
    assert capsys.readouterr().err.strip() == expected


def test_training_that_was_done_or_never_validated_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, short = tmp_path / "a run", ["--trainer.max_steps=2", "--trainer.val_check_interval=9"]
    assert dsmr("fit", *SMOKE, *short, "--root", tmp_path, "--name", "a run") == 0
    out = capsys.readouterr().out
    assert "no validation ran" in out
    assert f"next: dsmr fit --resume '{run}'" in out
    assert dsmr("fit", "--resume", run) == 0
    assert "nothing was left to train: 2 steps are done" in capsys.readouterr().out


FORMER = {
    "dsmr.optim.AdamW": "dsmr.training.AdamW",
    "dsmr.optim.WarmupCosine": "dsmr.training.WarmupCosine",
    "dsmr.callbacks.PeakMemory": "dsmr.training.callbacks.PeakMemory",
    "dsmr.callbacks.Samples": "dsmr.generate.samples.Samples",
}


def test_a_run_whose_config_has_class_paths_of_an_earlier_version_resumes(smoke_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "smoke"
    shutil.copytree(smoke_run, run)
    text = (run / "config.yaml").read_text()
    for former, current in FORMER.items():
        text = text.replace(current, former)
    assert "dsmr.optim.AdamW" in text
    (run / "config.yaml").write_text(text)
    former = ["--model.optimizer", "dsmr.optim.AdamW", "--trainer.callbacks+", "dsmr.callbacks.PeakMemory"]
    options = ["--trainer.max_steps", "22", "--trainer.enable_progress_bar=false"]
    assert dsmr("fit", "--resume", run, *former, *options) == 0
    assert read_checkpoint(run / "last.ckpt")["global_step"] == 22
    assert not any(path in (run / "config.yaml").read_text() for path in FORMER)
    assert dsmr("validate", "--checkpoint", run, "--trainer.enable_progress_bar=false") == 0


@pytest.mark.parametrize(("former", "current"), FORMER.items())
def test_class_paths_of_earlier_versions_name_the_same_classes(former: str, current: str) -> None:
    module, _, name = current_path(former).rpartition(".")
    assert getattr(importlib.import_module(module), name).__name__ == current.rpartition(".")[2]
    assert load_yaml(f"[{{class_path: {former}}}, {former}.x]")[0]["class_path"] == f"{module}.{name}"
    assert current_path(f"see {former}") == f"see {former}"


def test_the_help_of_training_is_short_and_has_own_options_first(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("fit", "validate", "test"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert len(shown.splitlines()) < 120
        places = [shown.index(option) for option in ("--checkpoint", "--data.num_lanes", "--model.horizons")]
        assert places == sorted(places)
        assert "--trainer.max_steps" not in shown.replace("(--trainer.max_steps", "")
        assert "--model.backbone.help CLASS" in shown
    with pytest.raises(SystemExit):
        main(["fit", "--help-trainer"])
    shown = capsys.readouterr().out
    assert "--trainer.max_steps" in shown
    assert "default: 100000" in shown  # of base.yaml
    assert "--data.num_lanes" not in shown


def test_the_options_of_a_network_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model.backbone.help", "RecurrentTransformer"])
    shown = capsys.readouterr().out
    assert "--model.backbone.num_layers" in shown
    assert "--model.backbone.vocab_size" not in shown


def test_dashes_and_underscores_are_both_accepted(tmp_path: Path) -> None:
    options = [
        "--trainer.max-steps",
        2,
        "--save-every-n-steps=1",
        "--model.backbone.num-heads",
        1,
        "--data.num-lanes=2",
    ]
    assert dsmr("fit", *SMOKE, *options, "--root", tmp_path, "--name", "with-dash") == 0
    config = yaml.safe_load((tmp_path / "with-dash" / "config.yaml").read_text())
    assert (config["save_every_n_steps"], config["data"]["num_lanes"]) == (1, 2)
    assert config["model"]["backbone"]["init_args"]["num_heads"] == 1


@pytest.mark.parametrize(
    ("arguments", "use"),
    [
        (["predict"], "use dsmr generate --prompt validation"),
        (["evaluate", "made"], "use dsmr judge"),
        (["validate", "--ablate"], "use dsmr analyze"),
    ],
)
def test_what_was_removed_names_its_replacement(
    arguments: list[str], use: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert use in line
