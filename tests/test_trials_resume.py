"""A run that is killed at any moment and resumed equals the run left alone, bitwise; a full disk spoils nothing."""

from typing import Any

import pytest

from conftest import trial_cases

TRIALS = "resume"
SHORT = ("killed_and_resumed", "disk_full", "disk_without_room_for_a_checkpoint")


@pytest.mark.parametrize("outcome", trial_cases(SHORT, (*SHORT, "killed_by_epochs")), indirect=True)
def test_a_run_that_is_killed_or_has_no_room_ends_bitwise_alike(outcome: dict[str, Any]) -> None:
    assert outcome["failures"] == []
    assert outcome["cases"] >= 1
