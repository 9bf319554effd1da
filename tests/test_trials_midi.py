"""Mutated and odd MIDI files are kept or refused with a reason, and change no neighbour."""

from typing import Any

import pytest

from conftest import trial_cases

TRIALS = "midi"
NAMES = ("odd", "bounds", "mutants")


@pytest.mark.parametrize("outcome", trial_cases(NAMES, NAMES), indirect=True)
def test_bad_midi_is_kept_or_refused_and_changes_no_neighbour(outcome: dict[str, Any]) -> None:
    assert outcome["failures"] == []
    assert outcome["cases"] >= 1
