"""`dsmr sweep`: trials of a file, run here, killed and gone on with; mistakes by key and line."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import yaml

from dsmr.cli import main
from dsmr.cli.lightning import QUIET
from dsmr.cli.sweep import spec
from dsmr.cli.sweep.remote import wandb_content
from dsmr.model.horizons import parse_horizons

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
COMMAND = ["dsmr", "fit", "${args}"]
PLACEMENTS = ["lower", "upper", "interleaved"]
SMOKE = ["--config", "smoke", "--model.horizons.num_long", "1", "--model.horizons.long", "320"]
SMALL = [*SMOKE, "--model.horizons.short", "64", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(autouse=True)
def lightnings_own_warnings() -> None:
    """Keep the program's own filters inside a test."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)


def write(folder: Path, **changes: object) -> Path:
    content: dict = {"program": "dsmr", "method": "grid", "command": COMMAND}
    content |= {"parameters": {"seed_everything": {"values": [0, 1]}}} | changes
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
    return path


def test_a_grid_is_every_combination_and_nested_keys_are_joined(tmp_path: Path) -> None:
    parameters = {
        "model": {"parameters": {"horizons": {"values": ["2x64", "2x0"]}, "asked_weight": {"value": 2}}},
        "seed_everything": {"values": [0, 1, 2]},
    }
    command = ["${env}", "${program}", "fit", "--config", "wandb", "--config=smoke", "${args}"]
    sweep = spec.read(write(tmp_path, parameters=parameters, command=command), ("--config", "laptop", "--x=1"))
    trials = spec.trials(sweep)
    assert [trial.name for trial in trials] == [
        f"horizons={h},seed={s}" for h, s in itertools.product(["2x64", "2x0"], [0, 1, 2])
    ]
    own = ("--model.horizons=2x0", "--model.asked_weight=2", "--seed_everything=1")
    assert trials[4].arguments == ("--config", "laptop", "--config=smoke", "--x=1", *own)
    assert len(spec.trials(sweep, count=4)) == 4
    content = wandb_content(sweep)
    assert content["command"][:4] == ["dsmr", "fit", "--config", "laptop"]
    assert content["command"][-1] == "${args}"
    assert content["parameters"]["model.horizons"] == {"values": ["2x64", "2x0"]}


def test_random_trials_repeat_and_more_of_them_change_none(tmp_path: Path) -> None:
    parameters = {
        "model.optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "data.num_lanes": {"min": 1, "max": 4},
        "model.horizons": {"values": ["2x64", "2x0"], "probabilities": [1.0, 0.0]},
        "trainer.max_steps": {"distribution": "q_uniform", "min": 10, "max": 100, "q": 10},
    }
    sweep = spec.read(write(tmp_path, method="random", parameters=parameters, run_cap=20))
    trials = spec.trials(sweep)
    assert trials == spec.trials(sweep)
    assert [t.values for t in spec.trials(sweep, 30)[:20]] == [t.values for t in trials]
    assert [t.values for t in spec.trials(sweep, seed=1)] != [t.values for t in trials]
    assert len({trial.name for trial in trials}) == 20
    for values in (trial.values for trial in trials):
        assert 1e-4 <= values["model.optimizer.lr"] <= 1e-2
        assert values["model.horizons"] == "2x64"
        assert values["trainer.max_steps"] % 10 == 0
    assert {trial.values["data.num_lanes"] for trial in trials} == {1, 2, 3, 4}
    assert sum(trial.values["model.optimizer.lr"] < 1e-3 for trial in trials) in range(4, 17)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "greedy"}, r"method \(.*sweep.yaml, line \d+\): 'greedy' is not one of grid, random, bayes"),
        ({"method": None}, "has no method"),
        ({"program": "train.py"}, "'train.py' is not dsmr"),
        ({"paramters": {}}, "unknown key of a sweep; did you mean parameters"),
        ({"parameters": None}, "has no parameters"),
        ({"parameters": {"seed_everything": {"vals": [1]}}}, "vals.*did you mean values"),
        ({"parameters": {"seed_everything": {"values": []}}}, "values must be a list"),
        ({"parameters": {"seed_everything": 3}}, "{value: 3}"),
        ({"parameters": {"seed_everything": {"value": 1, "values": [1]}}}, "exactly one of"),
        ({"parameters": {"a": {"min": 2, "max": 1}}}, r"min \(2\) must be below max \(1\)"),
        ({"parameters": {"a": {"values": [1, 2], "probabilities": [0.5, 0.1]}}}, "add up to 1"),
        ({"command": None}, "give command"),
        ({"command": ["python", "train.py", "${args}"]}, "give command"),
        ({"command": ["dsmr", "fit", "${args_json}"]}, "give command"),
        ({"command": ["dsmr", "fit", "${args}", "--x"]}, "must come last"),
        ({"metric": {"name": "a", "goal": "least"}}, "'least' is not one of"),
        ({"run_cap": 0}, "run_cap"),
    ],
)
def test_a_bad_file_is_refused_with_its_key(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        spec.read(write(tmp_path, **changes))


def test_what_needs_wandb_or_a_number_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bayes needs wandb"):
        spec.trials(spec.read(write(tmp_path, method="bayes")))
    with pytest.raises(ValueError, match="--trials N"):
        spec.trials(spec.read(write(tmp_path, method="random")))
    with pytest.raises(ValueError, match="a grid needs values"):
        spec.trials(spec.read(write(tmp_path, parameters={"a": {"min": 0.1, "max": 0.2}})))


def dsmr(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.yaml", "--local"], "nowhere.yaml: no such file"),
        ([EXPERIMENTS / "placement.yaml", "--local", "--name", "x"], "--name is the sweep's own"),
        ([EXPERIMENTS / "placement.yaml", "--device", "rtx-3060-12gb"], "belong to --dry-run"),
        ([EXPERIMENTS / "placement.yaml", "--dry-run", "--device", "rtx-9"], "rtx-9"),
        ([EXPERIMENTS / "placement.yaml", "--local", "--model.horizonz.long", "1"], "trial placement=lower,seed=0: "),
        ([EXPERIMENTS / "placement.yaml", "--local", "--trials", "0"], "--trials 0"),
        ([EXPERIMENTS / "placement.yaml"], "WANDB_MODE keeps this machine offline; use --local"),
    ],
)
def test_a_mistake_is_one_line_and_trains_nothing(
    arguments: list, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert dsmr("sweep", *arguments) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert said in line
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prices_every_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "dry.json"
    options = ["--dry-run", "--device", "rtx-3060-12gb", "--trainer.precision", "bf16-mixed", "--price-per-hour", "2"]
    assert dsmr("sweep", EXPERIMENTS / "placement.yaml", *options, "--output", output) == 0
    result = json.loads(output.read_text())
    assert [trial["horizons"] for trial in result["trials"][::2]] == [
        *("2x3584+10x512", "10x512+2x3584", "1x3584+5x512+1x3584+5x512")
    ]
    assert all(trial["budget"] == 12_288 and trial["fits"] for trial in result["trials"])
    assert result["total_hours"][1] == pytest.approx(sum(trial["hours"][1] for trial in result["trials"]))
    assert f"{2 * result['total_hours'][0]:.2f} to" in capsys.readouterr().out


def test_every_sweep_file_here_is_a_sweep_whose_trials_parse() -> None:
    files = list(EXPERIMENTS.glob("*.yaml"))
    assert {path.stem for path in files} >= {
        *("paper_table", "placement", "budget", "whole", "segment_length", "learning_rate", "study")
    }
    for path in files:
        assert dsmr("sweep", path, "--dry-run", "--trials", "100", "--output", os.devnull) == 0, path


@pytest.mark.parametrize(("name", "budget"), [("budget", 12_288), ("placement", 12_288), ("whole", 49_152)])
def test_trials_that_claim_one_budget_spend_it_to_the_token(name: str, budget: int, tmp_path: Path) -> None:
    output = tmp_path / "dry.json"
    assert dsmr("sweep", EXPERIMENTS / f"{name}.yaml", "--dry-run", "--output", output) == 0
    spellings = [trial["horizons"] for trial in json.loads(output.read_text())["trials"]]
    assert all(sum(parse_horizons(spelling)) == budget for spelling in spellings)
    assert len(set(spellings)) >= 3


def sweep_process(root: Path, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "dsmr", "sweep", str(EXPERIMENTS / "placement.yaml"), "--local"]
    options = ["--root", str(root), "--trials", "2", *SMALL, "--save_every_n_steps", "2"]
    environment = {**os.environ, "DSMR_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        return subprocess.Popen([*command, *options], env=environment, stdout=file, stderr=subprocess.STDOUT)


def test_a_sweep_that_is_killed_goes_on_and_what_is_done_stays_done(tmp_path: Path) -> None:
    log, second = tmp_path / "log", tmp_path / "placement" / "placement=lower,seed=1"
    killed = sweep_process(tmp_path, log)
    for _ in range(1200):
        if (second / "last.ckpt").is_file() or killed.poll() is not None:
            break
        time.sleep(0.1)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    first = tmp_path / "placement" / "placement=lower,seed=0"
    before = (first / "last.ckpt").read_bytes()
    assert json.loads((first / "trial.json").read_text())["status"] == "done"
    assert json.loads((second / "trial.json").read_text())["status"] == "begun"
    assert sweep_process(tmp_path, log).wait() == 0
    said = log.read_text()
    assert "[1 of 2] placement=lower,seed=0: done before, perplexity" in said
    assert "[2 of 2] placement=lower,seed=1: goes on" in said
    assert (first / "last.ckpt").read_bytes() == before
    for run in (first, second):
        with (run / "metrics.csv").open() as file:
            steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/nll"]]
        assert steps == [4, 9, 14, 19]
    table = (tmp_path / "placement" / "README.md").read_text()
    assert table.count("| `placement=lower,seed=") == 2
    other = sweep_process(tmp_path, log)
    assert other.wait() == 0
    assert log.read_text().count("done before") == 2


def test_a_trial_that_fails_is_told_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSMR_CACHE", str(tmp_path / "cache"))
    parameters = {"model.optimizer.lr": {"values": [1e-3, 1e38]}}
    path = write(tmp_path, parameters=parameters, command=["dsmr", "fit", "--config", "smoke", "${args}"])
    few = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "4", "--trainer.enable_progress_bar", "false"]
    assert dsmr("sweep", path, "--local", "--root", tmp_path, *few, "--json") == 1
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert [trial["status"] for trial in result["trials"]] == ["done", "failed"]
    assert "not finite" in result["trials"][1]["message"]
    assert result["best"] == "lr=0.001"
    assert dsmr("sweep", path, "--local", "--root", tmp_path, "--trainer.max_steps", "5") == 2
    assert "was begun with other options" in capsys.readouterr().err
