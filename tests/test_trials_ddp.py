"""A short form of experiments/reliability: two processes."""

from pathlib import Path

from conftest import trial


def test_two_processes_train_like_one_and_a_lost_one_is_told(tmp_path: Path) -> None:
    for name, outcome in trial("ddp", tmp_path).items():
        assert outcome["cases"] >= 1, name
        assert outcome["failures"] == [], name
