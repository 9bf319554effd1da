"""Two processes on a CPU train like one, and losing one of them ends the run with a message."""

from typing import Any

import pytest

from conftest import trial_cases

TRIALS = "ddp"
SHORT = ("same_training", "lost")


@pytest.mark.parametrize(
    ("outcomes", "name"), trial_cases(SHORT, (*SHORT, "whole_epochs", "evaluated")), indirect=["outcomes"]
)
def test_two_processes_train_like_one_and_report_a_lost_one(outcomes: dict[str, Any], name: str) -> None:
    assert outcomes[name]["cases"] >= 1
    assert outcomes[name]["failures"] == []
