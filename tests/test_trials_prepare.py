"""`dsmr prepare` when it is killed, runs twice at once or has no room, when stores are damaged or a file hangs."""

import os
import time
from typing import Any

import pytest

from conftest import trial_cases
from dsmr.data.workers import WORKER_THRESHOLD, map_in_workers

TRIALS = "prepare"
NAMES = ("killed", "workers_killed", "at_once", "no_room", "damaged")


def behave_like(name: str) -> str:
    """What a file's name says."""
    if name == "hang":
        time.sleep(600)
    if name == "crash":
        os.abort()
    return f"read {name}"


def test_a_file_that_hangs_or_crashes_its_reader_takes_no_other_with_it() -> None:
    names = [*map(str, range(WORKER_THRESHOLD)), "hang", "between", "crash", "last"]
    found = dict(zip(names, map_in_workers(behave_like, names, num_workers=2, seconds=10), strict=True))
    assert found.pop("hang") == "took longer than 10 s to read"
    assert found.pop("crash").startswith("crashed the process that read it (exit status")
    assert found == {name: f"read {name}" for name in names if name not in ("hang", "crash")}


@pytest.mark.parametrize("outcome", trial_cases(NAMES, NAMES), indirect=True)
def test_preparing_survives_kills_full_disks_and_damage(outcome: dict[str, Any]) -> None:
    assert outcome["failures"] == []
    assert outcome["cases"] >= 1
