"""`dsmr sweep`: trials of a file, run here, killed and gone on with; mistakes by key and line."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from dsmr.cli import main
from dsmr.cli.config_files import FOLDER, SWEEPS, shipped
from dsmr.cli.lightning_cli import QUIET
from dsmr.cli.sweep import local, logs_to_wandb, spec, split_options, wandb_content
from dsmr.cli.sweep.spec import Trial
from dsmr.cli.sweep.state import BEGUN, DONE, FAILED, check_same, checked, read_state, write_state
from dsmr.model.horizons import parse_horizons

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
    sweep = spec.read_sweep(write(tmp_path, parameters=parameters, command=command), ("--config", "laptop", "--x=1"))
    trials = spec.make_trials(sweep)
    assert [trial.name for trial in trials] == [
        f"horizons={h},seed={s}" for h, s in itertools.product(["2x64", "2x0"], [0, 1, 2])
    ]
    own = ("--model.horizons=2x0", "--model.asked_weight=2", "--seed_everything=1")
    assert trials[4].arguments == ("--config", "laptop", "--config=smoke", "--x=1", *own)
    assert len(spec.make_trials(sweep, count=4)) == 4
    content = wandb_content(sweep)
    assert content["command"][:4] == ["dsmr", "fit", "--config", "laptop"]
    assert content["command"][-1] == "${args}"
    assert content["parameters"]["model.horizons"] == {"values": ["2x64", "2x0"]}


def test_random_trials_repeat_and_more_of_them_change_none(tmp_path: Path) -> None:
    parameters = {
        "model.optimizer.lr": {"values": [1e-4, 1e-3, 1e-2]},
        "data.num_lanes": {"values": [1, 2, 3, 4]},
        "model.horizons": {"value": "2x64"},
    }
    sweep = spec.read_sweep(write(tmp_path, method="random", parameters=parameters, run_cap=20))
    trials = spec.make_trials(sweep)
    assert trials == spec.make_trials(sweep)
    assert [t.values for t in spec.make_trials(sweep, 30)[:20]] == [t.values for t in trials]
    assert [t.values for t in spec.make_trials(sweep, seed=1)] != [t.values for t in trials]
    assert len({trial.name for trial in trials}) == 20
    assert {trial.values["model.horizons"] for trial in trials} == {"2x64"}
    assert {trial.values["data.num_lanes"] for trial in trials} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "greedy"}, r"method \(.*sweep.yaml, line \d+\): 'greedy' is not one of grid, random, bayes"),
        ({"method": None}, "has no method"),
        ({"program": "train.py"}, "'train.py' is not dsmr"),
        ({"paramters": {}}, "unknown key of a sweep; did you mean parameters"),
        ({"parameters": None}, "has no parameters"),
        ({"parameters": {"seed_everything": {"values": []}}}, "values must be a list"),
        ({"parameters": {"seed_everything": 3}}, "{value: 3}"),
        ({"parameters": {"lr": {"parameters": None}}}, r"lr \(.*sweep.yaml, line \d+\): nested parameters must map"),
        ({"parameters": {"lr": {"parameters": ["a"]}}}, r"lr \(.*: nested parameters must map"),
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
        spec.read_sweep(write(tmp_path, **changes))


def test_what_needs_wandb_or_a_number_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bayes needs wandb"):
        spec.make_trials(spec.read_sweep(write(tmp_path, method="bayes")))
    with pytest.raises(ValueError, match="--trials N"):
        spec.make_trials(spec.read_sweep(write(tmp_path, method="random")))


@pytest.mark.parametrize("method", ["grid", "random"])
@pytest.mark.parametrize(
    "given",
    [
        {"min": 0.1, "max": 0.2},
        {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        {"mu": 0.0, "sigma": 0.5},
        {"values": [1, 2], "probabilities": [0.5, 0.5]},
        {"value": 1, "values": [1]},
        {"vals": [1]},
    ],
)
def test_what_wandb_draws_is_left_to_wandb(tmp_path: Path, method: str, given: dict) -> None:
    sweep = spec.read_sweep(write(tmp_path, method=method, parameters={"lr": given}))
    assert wandb_content(sweep)["parameters"]["lr"] == given
    with pytest.raises(
        ValueError, match=r"lr \(.*sweep.yaml\): here a parameter takes value or values; leave out --local"
    ):
        spec.make_trials(sweep, 1)


def test_more_trials_rename_none(tmp_path: Path) -> None:
    parameters = {"model.horizons": {"values": ["2x64", "2x0"]}}
    sweep = spec.read_sweep(write(tmp_path, method="random", parameters=parameters))
    names = [trial.name for trial in spec.make_trials(sweep, 6)]
    assert [trial.name for trial in spec.make_trials(sweep, 3)] == names[:3]
    assert len(set(names)) == 6
    assert {"horizons=2x64", "horizons=2x0", "horizons=2x0-2"} <= set(names)


def test_a_trials_name_is_never_that_of_another(tmp_path: Path) -> None:
    parameters = {"a": {"values": ["x", "x", "x-2", "x"]}}
    names = [trial.name for trial in spec.make_trials(spec.read_sweep(write(tmp_path, parameters=parameters)))]
    assert names == ["a=x", "a=x-2", "a=x-2-2", "a=x-3"]


@pytest.mark.parametrize("given", ["wandb", "trainer/wandb", FOLDER / "trainer" / "wandb.yaml"])
@pytest.mark.parametrize("is_joined", [True, False])
def test_wandbs_logger_is_known_however_its_config_is_spelt(tmp_path: Path, given: object, is_joined: bool) -> None:
    words = [f"--config={given}"] if is_joined else ["-c", str(given)]
    sweep = spec.read_sweep(write(tmp_path, command=["dsmr", "fit", "--config", "smoke", *words, "${args}"]))
    assert logs_to_wandb(sweep)
    assert spec.make_trials(sweep)[0].arguments == ("--config", "smoke", "--seed_everything=0")
    assert not logs_to_wandb(spec.read_sweep(write(tmp_path, command=["dsmr", "fit", "--config", "smoke", "${args}"])))


@pytest.mark.parametrize(
    ("arguments", "mine", "extra"),
    [
        ("F --local --x 1", "F --local", "--x 1"),
        ("--local F", "F --local", ""),
        ("--root r --dry_run F", "F --root r --dry_run", ""),
        ("--price_per_hour=2 --dry-run F", "F --price_per_hour=2 --dry_run", ""),
        ("--config smoke --save_every_n_steps 3 F --local", "F --local", "--config smoke --save_every_n_steps 3"),
        ("--x=1 F --y -1", "F", "--x=1 --y -1"),
    ],
)
def test_the_file_is_the_first_word_that_is_no_options(arguments: str, mine: str, extra: str) -> None:
    assert split_options(arguments.split()) == (mine.split(), extra.split())


def dsmr(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.yaml", "--local"], "nowhere.yaml: no such file"),
        (["placment", "--local"], "placment: no such file or shipped sweep; did you mean placement?"),
        ([SWEEPS / "placement.yaml", "--local", "--jobs", "0"], "--jobs 0 must be at least 1"),
        ([SWEEPS / "placement.yaml", "--jobs", "2"], "--jobs belongs to --local"),
        ([SWEEPS / "placement.yaml", "--local", "--name", "x"], "--name is set by the sweep itself"),
        ([SWEEPS / "placement.yaml", "--device", "rtx-3060-12gb"], "belong to --dry_run"),
        ([SWEEPS / "placement.yaml", "--dry-run", "--device", "rtx-9"], "rtx-9"),
        ([SWEEPS / "placement.yaml", "--local", "--model.horizonz.long", "1"], "trial placement=lower,seed=0: "),
        ([SWEEPS / "placement.yaml", "--local", "--trials", "0"], "--trials 0"),
        (
            [SWEEPS / "placement.yaml", "--dry-run", "--seed_everything", "3"],
            "--seed_everything is varied by the sweep",
        ),
        (
            [SWEEPS / "placement.yaml", "--dry-run", "--seed-everything=3"],
            "--seed_everything=3 is varied by the sweep",
        ),
        ([SWEEPS / "placement.yaml", "--local", "--ckpt-path", "x"], "--ckpt_path is set by the sweep itself"),
        ([SWEEPS / "placement.yaml", "--lokal"], "unknown key lokal"),
        ([SWEEPS / "placement.yaml", "--local", "--seed", "-1"], "--seed -1 must be at least 0"),
        *[
            (
                [SWEEPS / "placement.yaml", *words],
                f"{words[0]}: --root, --seed, --json, --output belong to --local",
            )
            for words in (["--root", "runs"], ["--seed", "0"], ["--json"], ["--output", "x.json"])
        ],
        ([SWEEPS / "placement.yaml"], "WANDB_MODE keeps this machine offline; use --local"),
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
    assert dsmr("sweep", SWEEPS / "placement.yaml", *options, "--output", output) == 0
    result = json.loads(output.read_text())
    assert [trial["horizons"] for trial in result["trials"][::2]] == [
        *("2x3584+10x512", "10x512+2x3584", "1x3584+5x512+1x3584+5x512")
    ]
    assert all(trial["budget"] == 12_288 and trial["fits"] for trial in result["trials"])
    assert result["total_hours"][1] == pytest.approx(sum(trial["hours"][1] for trial in result["trials"]))
    assert f"{2 * result['total_hours'][0]:.2f} to" in capsys.readouterr().out


def test_what_follows_a_dry_run_is_the_same_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = SWEEPS / "learning_rate.yaml"
    words = ["--trials", "2", "--seed", "3", "--root", tmp_path / "two words", "--data.num_lanes", "4"]
    assert dsmr("sweep", "--dry_run", path, *words) == 0
    expected = (
        f"next: dsmr sweep {path} --local --trials 2 --seed 3 --root '{tmp_path}/two words' --data.num_lanes 4\n"
    )
    assert capsys.readouterr().out.endswith(expected)


def test_every_shipped_sweep_is_found_by_name_and_its_trials_parse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = spec.shipped_sweeps()
    assert {*names} >= {
        "paper_table",
        "placement",
        "budget",
        "whole",
        "segment_length",
        "learning_rate",
        "study",
        "gate",
    }
    for name in names:
        assert dsmr("sweep", name, "--dry-run", "--output", os.devnull) == 0, name
        assert spec.find_sweep(name) == SWEEPS / f"{name}.yaml"
    assert not [name for name in shipped() if name.startswith("sweeps/")]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        dsmr("sweep", "--help")
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)


@pytest.mark.parametrize(("name", "budget"), [("budget", 12_288), ("placement", 12_288), ("whole", 49_152)])
def test_trials_that_claim_one_budget_spend_it_to_the_token(name: str, budget: int, tmp_path: Path) -> None:
    output = tmp_path / "dry.json"
    assert dsmr("sweep", SWEEPS / f"{name}.yaml", "--dry-run", "--output", output) == 0
    spellings = [trial["horizons"] for trial in json.loads(output.read_text())["trials"]]
    assert all(sum(parse_horizons(spelling)) == budget for spelling in spellings)
    assert len(set(spellings)) >= 3


def sweep_process(root: Path, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "dsmr", "sweep", str(SWEEPS / "placement.yaml"), "--local"]
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
    assert "[2 of 2] placement=lower,seed=1: resumes" in said
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
    assert "was started with other options" in capsys.readouterr().err


def finished(folder: Path, metric: str) -> Path:
    """A sweep of one trial, which is done; gives the file."""
    path = write(folder, parameters={"seed_everything": {"values": [0]}}, metric={"name": metric})
    run = folder / "sweep" / "seed=0"
    write_state(run, spec.make_trials(spec.read_sweep(path))[0], DONE)
    backbone = {"class_path": "dsmr.model.RecurrentTransformer", "init_args": {"num_layers": 2}}
    config = {"model": {"horizons": "2x64", "backbone": backbone}, "data": {}, "trainer": {}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.csv").write_text("step,train/nll,val/perplexity\n4,5.0,\n9,4.0,60.5\n")
    return path


def test_a_metric_that_no_trial_logged_is_told_beside_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished(tmp_path, "val/perplexty")
    assert dsmr("sweep", path, "--local", "--root", tmp_path, "--json") == 1
    out = capsys.readouterr().out
    expected = "metric val/perplexty was not logged; did you mean val/perplexity?; logged: val/perplexity\n"
    assert expected in out
    assert "| `seed=0` |" in (tmp_path / "sweep" / "README.md").read_text()
    assert json.loads(out.splitlines()[-1])["best"] is None
    assert dsmr("sweep", finished(tmp_path, "val/perplexity"), "--local", "--root", tmp_path) == 0


def test_without_matplotlib_there_is_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmr.results.plotting.find_spec", lambda name: None)
    assert dsmr("sweep", finished(tmp_path, "val/perplexity"), "--local", "--root", tmp_path) == 0
    assert "| `seed=0` |" in (tmp_path / "sweep" / "README.md").read_text()
    assert not list((tmp_path / "sweep").glob("*.png"))


def test_a_config_file_that_changed_is_refused_where_a_result_would_be_the_old_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = tmp_path / "own.yaml", tmp_path / "sweep" / "seed=0"
    config.write_text("trainer: {max_steps: 3}")
    path = write(tmp_path, command=["dsmr", "fit", "--config", str(config), "${args}"])
    trial = checked(spec.make_trials(spec.read_sweep(path)))[0]
    write_state(run, trial, DONE)
    config.write_text("trainer: {max_steps: 3, enable_progress_bar: false}\ndata: {num_workers: 1, cache_dir: x}")
    assert checked([trial]) == [trial]
    config.write_text("trainer: {max_steps: 4}")
    assert dsmr("sweep", path, "--local", "--root", tmp_path) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"{run} was started with other settings" in line
    assert "choose another --root, or delete it" in line
    changed = checked([trial])[0]
    write_state(run, trial, FAILED)
    check_same(changed, run)  # begins anew
    (run / "last.ckpt").touch()
    with pytest.raises(ValueError, match="was started with other settings"):
        check_same(changed, run)
    write_state(run, replace(trial, fingerprint=None), DONE)
    check_same(changed, run)  # of a version that kept none


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt"])
def test_a_run_that_no_sweep_began_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match="no sweep started"):
        check_same(Trial("a", {}, ()), tmp_path)


def test_a_trial_goes_on_from_what_a_process_of_a_killed_sweep_still_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, run, given = Trial("a", {}, ()), tmp_path / "a", []
    monkeypatch.setattr(local, "run_child", lambda arguments, *_: given.append(arguments) or 0)
    (tmp_path / "logs").mkdir()
    write_state(run, trial, BEGUN)
    (run / "best.ckpt").touch()
    lock = FileLock(tmp_path / "logs" / ".a.lock", thread_local=False)
    lock.acquire()

    def save() -> None:
        (run / "last.ckpt").touch()
        lock.release()

    threading.Timer(0.5, save).start()
    assert local.run_trial(trial, tmp_path, lambda line: None, "a").status == DONE
    assert given == [["fit", "--resume", str(run)]]
    assert (run / "best.ckpt").is_file()


def test_a_trial_that_another_process_trains_for_long_fails_and_keeps_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "SECONDS_TO_SAVE", 0.1)
    trial = Trial("a", {}, ())
    (tmp_path / "logs").mkdir()
    write_state(tmp_path / "a", trial, BEGUN)
    with FileLock(tmp_path / "logs" / ".a.lock"):
        outcome = local.run_trial(trial, tmp_path, lambda line: None, "a")
    assert (outcome.status, outcome.message) == (FAILED, local.lock_message(tmp_path / "logs" / ".a.lock"))
    assert read_state(tmp_path / "a")["status"] == BEGUN


def test_only_the_first_process_of_a_trial_takes_its_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsmr.cli.sweep.child", str(tmp_path / "lock"), "--version"]
    with FileLock(tmp_path / "lock"):
        done = subprocess.run(
            command, env={**os.environ, "LOCAL_RANK": "1"}, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
        )
    assert (done.returncode, done.stdout[:5]) == (0, b"dsmr ")


def two_trials_that(
    ending: str, folder: Path, monkeypatch: pytest.MonkeyPatch, num_jobs: int = 1
) -> list[local.Outcome]:
    """Run two trials whose processes do no more than end."""
    program = folder / "program"
    program.write_text(f"#!/bin/sh\n{ending}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    sweep = spec.read_sweep(write(folder))
    return local.run_trials(sweep, spec.make_trials(sweep), folder, lambda line: None, num_jobs)


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("kill -KILL $$", "killed by signal 9 (SIGKILL), see "),
        ("kill -SEGV $$", "killed by signal 11 (SIGSEGV), see "),
        ("kill -ABRT $$", "killed by signal 6 (SIGABRT), see "),
        ("exit 137", "killed by signal 9 (SIGKILL), see "),
        ("echo dsmr: error: bad; exit 2", "bad"),
        ("echo bad; exit 255", "bad"),
    ],
)
def test_a_trial_that_is_killed_has_failed_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, said: str
) -> None:
    outcomes = two_trials_that(ending, tmp_path, monkeypatch)
    assert [outcome.status for outcome in outcomes] == [FAILED, FAILED]
    for outcome in outcomes:
        log = tmp_path / "sweep" / "logs" / f"{outcome.trial.name}.log"
        assert outcome.message == (f"{said}{log}" if said.endswith("see ") else said)
        assert read_state(tmp_path / "sweep" / outcome.trial.name)["message"] == outcome.message


def test_jobs_run_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meet = "touch here.$$; for i in $(seq 200); do [ $(ls here.* | wc -l) = 2 ] && echo met && exit 2; sleep 0.1; done"
    outcomes = two_trials_that(f"cd {tmp_path}; {meet}", tmp_path, monkeypatch, num_jobs=2)
    assert [outcome.message for outcome in outcomes] == ["met", "met"]


@pytest.mark.parametrize(
    ("ending", "status"), [("kill -TERM $$", 143), ("kill -USR1 $$", 138), ("exit 143", 143), ("exit 130", 130)]
)
def test_a_trial_that_is_asked_to_stop_stops_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, status: int
) -> None:
    with pytest.raises(local.Stopped) as stopped:
        two_trials_that(ending, tmp_path, monkeypatch)
    assert stopped.value.status == status
    assert read_state(tmp_path / "sweep" / "seed=0")["status"] == BEGUN
    assert read_state(tmp_path / "sweep" / "seed=1") is None


def test_the_reason_of_a_failure_is_found_between_progress_bars(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(
        b"Epoch 0:  50%\r\x1b[AEpoch 0: 60%]\x1b[Adsmr: error: no room, make some\nValidation: |  |\r\x1b[A"
    )
    assert local.last_line(log) == "no room, make some"
    log.write_bytes(b"Traceback\nRuntimeError: lost\n\x1b[A")
    assert local.last_line(log) == "RuntimeError: lost"
    log.write_bytes(b"")
    assert "no output" in local.last_line(log)
