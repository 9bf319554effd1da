"""Mutated and odd MIDI files are kept or refused with a reason, and change no neighbour."""

from typing import Any

import pytest

from conftest import trial_cases

TRIALS = "midi"
NAMES = ("odd", "bounds", "mutants")


@pytest.mark.parametrize(("outcomes", "name"), trial_cases(NAMES, NAMES), indirect=["outcomes"])
def test_bad_midi_is_kept_or_refused_and_changes_no_neighbour(outcomes: dict[str, Any], name: str) -> None:
    assert outcomes["mutants"]["cases"] in (500, 10_000)
    assert outcomes[name]["cases"] >= 1
    assert outcomes[name]["failures"] == []
