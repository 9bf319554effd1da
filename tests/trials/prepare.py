"""`dsmr prepare` that is killed, run twice at once, or has no room; stores that were damaged.

    python tests/trials/prepare.py [--short] [--output FILE.json] [--root FOLDER]

Each case must end with the store that an undisturbed run writes, or with a one-line message.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import fill, in_process, last_line, run, small_disk
from symusic import Note, Score, Tempo, Track

from dsmr import UserError
from dsmr.cli import main
from dsmr.data.datamodule import MusicData
from dsmr.data.store_writer import StoreWriter

NUM_PIECES = 15  # read in one process, in a moment
MANY_PIECES = 40  # read by workers
UNTRIED = -1000


def write_pieces(folder: Path, count: int) -> Path:
    """Write a folder of small pieces."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for number in range(count):
        score, track, time_ = Score(480), Track("", 0, False), 0
        score.tempos.append(Tempo(0, 100))
        for _ in range(200):
            time_ += draw.randrange(400)
            track.notes.append(Note(time_, 1 + draw.randrange(900), draw.randrange(30, 100), draw.randrange(1, 128)))
        score.tracks.append(track)
        score.dump_midi(folder / f"{number:02d}.mid")
    return folder


def prepare(pieces: Path, cache: Path) -> int:
    """Run `dsmr prepare` on a folder, into a cache."""
    return main(["prepare", "--data.path", str(pieces), "--data.cache_dir", str(cache)])


def stores(cache: Path) -> dict[str, bytes]:
    """Return all files in a cache, partial stores and leftovers included."""
    found = {}
    for path in sorted(cache.rglob("*")):
        if path.is_file() and path.suffix != ".lock":
            found[str(path.relative_to(cache))] = path.read_bytes()
    return found


def killed(root: Path, pieces: Path, whole: dict[str, bytes], *, short: bool) -> dict[str, Any]:
    """Send SIGKILL after a number of pieces, and while the store is finished; then prepare again, undisturbed."""
    failures = []
    moments: list[int | str] = [0, 7, "index", "rename"] if short else [*range(NUM_PIECES), "index", "rename"]

    def dies_at(moment: int | str) -> Callable[[], int]:
        def work() -> int:
            add, finish, rename = StoreWriter.add, StoreWriter.finish, Path.rename

            def add_or_die(self: StoreWriter, *arguments: Any, **options: Any) -> None:
                if len(self.pieces) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                add(self, *arguments, **options)

            def finish_or_die(self: StoreWriter) -> Any:
                if moment == "index":
                    os.kill(os.getpid(), signal.SIGKILL)
                return finish(self)

            def rename_or_die(self: Path, target: Path) -> Path:
                if moment == "rename":
                    os.kill(os.getpid(), signal.SIGKILL)
                return rename(self, target)

            StoreWriter.add, StoreWriter.finish = add_or_die, finish_or_die
            Path.rename = rename_or_die
            return prepare(pieces, root / f"killed-{moment}")

        return work

    for moment in moments:
        cache, log = root / f"killed-{moment}", root / "killed.log"
        if in_process(dies_at(moment), log) != -signal.SIGKILL:
            failures.append(f"at {moment}: it was not killed")
        if any(not path.name.startswith(".") for path in cache.iterdir() if path.is_dir()):
            failures.append(f"at {moment}: half a store has its name")
        if in_process(lambda cache=cache: prepare(pieces, cache), log):
            failures.append(f"at {moment}: it does not prepare again: {last_line(log)}")
        if stores(cache) != whole:
            failures.append(f"at {moment}: another store")
    return {"cases": len(moments), "failures": failures}


def workers_killed(root: Path) -> dict[str, Any]:
    """Send SIGKILL to the main process while its workers read: no process survives, no piece is lost."""
    pieces, failures = write_pieces(root / "many", MANY_PIECES), []
    cache, log = root / "killed-workers", root / "workers.log"
    child = os.fork()
    if child == 0:
        os.setsid()
        os._exit(in_process(lambda: prepare(pieces, cache), log) & 0xFF)
    if not within(60, lambda: len(members(child)) >= 5):
        failures.append(f"there were no workers, but {members(child)}")
    time.sleep(2)
    main_process = children_of(child)[0]
    os.kill(main_process, signal.SIGKILL)
    os.waitpid(child, 0)
    if not within(60, lambda: not members(child)):
        failures.append(f"{len(members(child))} workers outlived the process that began them")
    if in_process(lambda: prepare(pieces, cache), log):
        failures.append(f"it does not prepare again: {last_line(log)}")
    index = json.loads(next(v for k, v in stores(cache).items() if k.endswith("json")))
    if len(index["pieces"]) != MANY_PIECES or index["refused"]:
        failures.append("another store")
    return {"cases": 1, "failures": failures}


def within(seconds: float, happens: Callable[[], bool]) -> bool:
    """Return True if `happens` becomes true within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if happens():
            return True
        time.sleep(0.1)
    return False


def children_of(process: int) -> list[int]:
    """Return the child processes of a process."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def members(session: int) -> list[int]:
    """Return the processes of a session, without zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(number) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def at_once(root: Path, pieces: Path, whole: dict[str, bytes], *, short: bool) -> dict[str, Any]:
    """Prepare the same pieces in several processes at the same time."""
    failures = []
    cases = 1 if short else 3
    for case in range(cases):
        cache = root / f"together-{case}"
        children = []
        for number in range(2 + case):
            child = os.fork()
            if child == 0:
                status = in_process(lambda cache=cache: prepare(pieces, cache), root / f"together-{case}-{number}.log")
                os._exit(status & 0xFF)
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(statuses):
            failures.append(f"{len(children)} at once: exit statuses {statuses}")
        if stores(cache) != whole:
            failures.append(f"{len(children)} at once: another store")
    return {"cases": cases, "failures": failures}


def no_room(root: Path, pieces: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    """Prepare into a full disk, a folder without write permission, and a file in place of the folder."""
    failures, lines = [], {}
    for room in (0, 20_000):
        log = root / f"room{room}.log"
        with small_disk(root / f"disk{room}", 1) as kind:
            if not kind.startswith("a file system"):
                break
            cache = root / f"disk{room}" / "cache"
            fill(root / f"disk{room}" / "filler", room)
            status = in_process(lambda cache=cache: prepare(pieces, cache), log)
            lines[f"{room} bytes left"] = last_line(log).replace(str(root), "")
            if status != 2 or not last_line(log).startswith("dsmr: error: cannot write the token store"):
                failures.append(f"{room} bytes left: exit status {status}: {last_line(log)}")
            if cache.exists() and stores(cache):
                failures.append(f"{room} bytes left: {list(stores(cache))} stays")
            (root / f"disk{room}" / "filler").unlink()
            if in_process(lambda cache=cache: prepare(pieces, cache), log) or stores(cache) != whole:
                failures.append(f"{room} bytes left: no whole store once there is room")
    for name, status in {
        "a file instead of the cache": in_process(lambda: prepare(pieces, occupied(root)), root / "denied0.log"),
        "a file system that is read only": read_only(root, pieces, root / "denied1.log"),
        "a folder of another user": in_process(lambda: prepare_as_nobody(root, pieces), root / "denied2.log"),
    }.items():
        line = last_line(root / f"denied{len(lines) - 2}.log")
        lines[name] = line.replace(str(root), "")
        if status not in (2, UNTRIED) or not line.startswith("dsmr: error: cannot write the token store"):
            failures.append(f"{name}: exit status {status}: {line}")
    return {"cases": len(lines), "lines": lines, "failures": failures}


def occupied(root: Path) -> Path:
    """Return a file in place of the cache."""
    (root / "occupied").write_bytes(b"")
    return root / "occupied"


def read_only(root: Path, pieces: Path, log: Path) -> int:
    """Prepare into a read-only file system."""
    with small_disk(root / "readonly", 1) as kind:
        if not kind.startswith("a file system"):
            log.write_text("dsmr: error: cannot write the token store: not tried, nothing can be mounted here")
            return UNTRIED
        subprocess.run(["mount", "-o", "remount,ro", str(root / "readonly")], check=True)
        return in_process(lambda: prepare(pieces, root / "readonly" / "cache"), log)


def prepare_as_nobody(root: Path, pieces: Path) -> int:
    """Prepare without write permission, which root always has."""
    for folder in (root, *root.parents):
        if folder.stat().st_uid == os.getuid() and folder.name.startswith("tmp"):
            folder.chmod(0o755)
    (root / "foreign").mkdir(mode=0o555)
    if os.getuid() == 0:
        os.setuid(65534)
    return prepare(pieces, root / "foreign")


def damaged(root: Path, pieces: Path, whole: dict[str, bytes], *, short: bool) -> dict[str, Any]:
    """Flip single bits of a store and truncate its files: reported elsewhere, prepared again in the cache."""
    draw, failures, cases = random.Random(1), [], 0
    cache = root / "damaged"
    MusicData(str(pieces), cache_dir=str(cache)).prepare_data()
    for name, content in whole.items():
        for _ in range(10 if short else 150):
            cases += 1
            broken = bytearray(content)
            if draw.random() < 0.2:
                del broken[draw.randrange(len(broken)) :]
            else:
                broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
            (cache / name).write_bytes(broken)
            try:
                store = MusicData(str((cache / name).parent)).store
            except UserError:
                pass
            else:
                failures.append(f"{name}: damage was not seen in {store.path}")
            MusicData(str(pieces), cache_dir=str(cache)).prepare_data()
            if stores(cache) != whole:
                failures.append(f"{name}: another store")
                (cache / name).write_bytes(content)
    return {"cases": cases, "failures": failures}


def work(root: Path, *, short: bool) -> dict[str, Any]:
    """Run all trials in a folder."""
    pieces = write_pieces(root / "pieces", NUM_PIECES)
    if in_process(lambda: prepare(pieces, root / "whole"), root / "whole.log"):
        raise SystemExit(last_line(root / "whole.log"))
    whole = stores(root / "whole")
    assert sorted(Path(name).name for name in whole) == ["index.json", "tokens.bin"], list(whole)
    assert len(json.loads(next(v for k, v in whole.items() if k.endswith("json")))["pieces"]) == NUM_PIECES
    found = {
        "killed": killed(root, pieces, whole, short=short),
        "workers_killed": workers_killed(root),
        "at_once": at_once(root, pieces, whole, short=short),
        "no_room": no_room(root, pieces, whole),
        "damaged": damaged(root, pieces, whole, short=short),
    }
    shutil.rmtree(root / "whole")
    return found


if __name__ == "__main__":
    raise SystemExit(run(__doc__, work))
