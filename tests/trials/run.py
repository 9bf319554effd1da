"""Every promise about lost work, bad files and danger, tried; the table goes into README.md beside this file.

    python experiments/reliability/run.py [--only TRIAL ...]      (make reliability)

Trials are scripts of this folder, in their long form, and the tests of tests/test_danger.py and of
tests/test_reliability.py's theorem with more examples. It takes about ten minutes on two cores.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent.parent.parent / "experiments" / "reliability"
TESTS = HERE.parent.parent / "tests"
NUM_MIXES = 1000
SCRIPTS = ("resume", "prepare", "midi", "ddp")
TESTED = {
    "danger": [str(TESTS / "test_danger.py"), str(TESTS / "test_data.py"), "-k", "danger or climbs or links or csv"],
    "version_1": [str(TESTS / "test_reliability.py"), "-k", "version_1"],
    "numbers": [str(TESTS / "test_module.py"), "-k", "no_number or bad_loss"],
    "lanes": [str(TESTS / "test_reliability.py"), "-k", "no_token_depends"],
}
PROMISES = {
    "resume.killed_and_resumed": "A run killed at any moment ends bitwise as if left alone, metrics.csv without gap",
    "resume.killed_by_epochs": "So does one that validates at the ends of epochs",
    "resume.disk_full": "A full disk stops a run with one line; the last checkpoint stays",
    "resume.disk_without_room_for_a_checkpoint": "So does one on which a checkpoint no longer fits",
    "prepare.killed": "`dsmr prepare` killed anywhere leaves no half store; the next one is whole",
    "prepare.workers_killed": "Its workers do not outlive it",
    "prepare.at_once": "Several at once leave one whole store",
    "prepare.no_room": "Full, read-only and foreign folders: one line, nothing left",
    "prepare.damaged": "Damaged stores are seen; in the cache they are prepared again",
    "midi.odd": "Hand-made odd MIDI is kept or refused as it should be",
    "midi.bounds": "Time and memory of a file are bounded",
    "midi.mutants": "Mutated MIDI never crashes, hangs, or changes a good neighbour",
    "danger": "Checkpoints with code, archives that climb out or swell are refused",
    "version_1": "A version-1 checkpoint gives its recorded logits, and its run goes on",
    "numbers": "A loss that is no number stops before the weights, and names piece, position and step",
    "lanes": "No token depends on another piece or lane",
    "ddp.same_training": "Two processes of two lanes train like one of four, to 1e-8",
    "ddp.lost": "A process that is killed, hangs or is asked to stop ends the run, which says so and goes on",
    "ddp.whole_epochs": "Unequal pieces over two processes: every token once, none waits",
    "ddp.evaluated": "Figures of two processes are those of one",
}


def script(name: str, folder: Path) -> dict[str, Any]:
    """Run a script's trials."""
    found = folder / f"{name}.json"
    ended = subprocess.run([sys.executable, str(TESTS / "trials" / f"{name}.py"), "--output", str(found)], check=False)
    if not found.is_file():
        return {name: {"cases": 0, "failures": [f"exit status {ended.returncode}"]}}
    return {f"{name}.{trial}": outcome for trial, outcome in json.loads(found.read_text()).items()}


def tests(name: str, folder: Path) -> dict[str, Any]:
    """Run tests, which count as cases; the theorem counts its examples."""
    found = folder / f"{name}.xml"
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", f"--junit-xml={found}"]
    subprocess.run([*pytest, *TESTED[name]], check=False, env={**os.environ, "DSMR_MIXES": str(NUM_MIXES)})
    cases = list(ElementTree.parse(found).getroot().iter("testcase"))
    bad = [
        case.get("name", "") for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    return {name: {"cases": NUM_MIXES if name == "lanes" else len(cases), "failures": bad}}


def table(found: dict[str, Any]) -> list[str]:
    """A row for each promise."""
    lines = ["| promise | trial | cases | failures |", "|---|---|---|---|"]
    for name, promise in PROMISES.items():
        if name in found:
            outcome = found[name]
            lines.append(f"| {promise} | `{name}` | {outcome['cases']:,} | {len(outcome['failures'])} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*SCRIPTS, *TESTED], default=[*SCRIPTS, *TESTED])
    options = parser.parse_args()
    began, found = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            found |= script(name, Path(folder)) if name in SCRIPTS else tests(name, Path(folder))
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    system = f"{platform.system()}, {os.cpu_count()} cores"
    place = f"Python {platform.python_version()}, torch {torch.__version__}, {system}"
    minutes = (time.monotonic() - began) / 60
    lines = table(found)
    print("\n".join(lines))
    failed = {name: outcome["failures"] for name, outcome in found.items() if outcome["failures"]}
    if set(options.only) == {*SCRIPTS, *TESTED}:
        result = {"commit": commit, "place": place, "minutes": round(minutes, 1), "trials": found}
        (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        readme = HERE / "README.md"
        head, mark, rest = readme.read_text(encoding="utf-8").partition("<!-- table -->\n")
        tail = rest.partition("<!-- end -->\n")[2]
        words = f"\nCommit {commit}, {place}, {minutes:.0f} minutes.\n\n"
        readme.write_text(head + mark + "\n".join(lines) + "\n" + words + "<!-- end -->\n" + tail, encoding="utf-8")
    for name, failures in failed.items():
        print(f"{name}: {'; '.join(failures)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
