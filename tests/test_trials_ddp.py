"""Two processes on a CPU train like one, and losing one of them ends the run with a message."""

from typing import Any

import pytest

from conftest import trial_cases

TRIALS = "ddp"
SHORT = ("same_training", "lost")


@pytest.mark.parametrize("outcome", trial_cases(SHORT, (*SHORT, "whole_epochs", "evaluated")), indirect=True)
def test_two_processes_train_like_one_and_report_a_lost_one(outcome: dict[str, Any]) -> None:
    assert outcome["failures"] == []
    assert outcome["cases"] >= 1
