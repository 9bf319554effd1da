"""Short forms of experiments/reliability: preparing that is disturbed, and MIDI files that are bad."""

from pathlib import Path

from conftest import trial


def test_preparing_survives_kills_full_disks_damage_and_broken_downloads(tmp_path: Path) -> None:
    for name, outcome in trial("prepare", tmp_path).items():
        assert outcome["cases"] >= 1, name
        assert outcome["failures"] == [], name


def test_500_mutated_and_all_odd_files_are_kept_or_refused_and_change_no_neighbour(tmp_path: Path) -> None:
    found = trial("midi", tmp_path)
    assert found["mutants"]["cases"] == 500
    for name, outcome in found.items():
        assert outcome["failures"] == [], name
