"""Short forms of experiments/reliability: preparing that is disturbed, and MIDI files that are bad."""

import os
import time
from pathlib import Path

from conftest import trial
from dsmr.data.workers import WORKER_THRESHOLD, map_in_workers


def behave_like(name: str) -> str:
    """What a file's name says."""
    if name == "hang":
        time.sleep(600)
    if name == "crash":
        os.abort()
    return f"read {name}"


def test_a_file_that_hangs_or_crashes_its_reader_takes_no_other_with_it() -> None:
    names = [*map(str, range(WORKER_THRESHOLD)), "hang", "between", "crash", "last"]
    found = dict(zip(names, map_in_workers(behave_like, names, num_workers=2, seconds=5), strict=True))
    assert found.pop("hang") == "took longer than 5 s to read"
    assert found.pop("crash").startswith("crashed the process that read it (exit status")
    assert found == {name: f"read {name}" for name in names if name not in ("hang", "crash")}


def test_preparing_survives_kills_full_disks_and_damage(tmp_path: Path) -> None:
    for name, outcome in trial("prepare", tmp_path).items():
        assert outcome["cases"] >= 1, name
        assert outcome["failures"] == [], name


def test_500_mutated_and_all_odd_files_are_kept_or_refused_and_change_no_neighbour(tmp_path: Path) -> None:
    found = trial("midi", tmp_path)
    assert found["mutants"]["cases"] == 500
    for name, outcome in found.items():
        assert outcome["failures"] == [], name
