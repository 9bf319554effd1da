"""Imports go one way, from room to room; imports for type checking count."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import dsmr

ROOT = Path(dsmr.__file__).parent
ORDER = (
    "batch",
    "attention",
    "model",
    "cost",
    "data",
    "results",
    "share",
    "training",
    "generate",
    "analyze",
    "benchmark",
    "cli",
    "__main__",
)
"""Rooms, each of which may import those before it. `model` and `data` never import each other."""
APART = {("data", "model"), ("data", "attention"), ("data", "cost")}
WITHOUT_LIGHTNING = (
    "attention",
    "model",
    "cost",
    *(f"data/{path.name}" for path in (ROOT / "data").glob("*.py") if path.name != "datamodule.py"),
)
WITHOUT_TORCH = (
    "model/horizons.py",
    "model/schedules.py",
    *(
        f"data/{path.name}"
        for path in (ROOT / "data").glob("*.py")
        if path.name not in ("datamodule.py", "lane_dataset.py", "lanes.py", "windows.py")
    ),
)


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever it does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def rooms_of(path: Path) -> set[str]:
    """Rooms that a file imports; `from dsmr import UserError` is none."""
    parts = {name.split(".")[1] for name in imported(path) if name.startswith("dsmr.")}
    return {part for part in parts if part in ORDER or (ROOT / part).is_dir()}


FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def test_every_file_is_in_a_room() -> None:
    assert {room(path) for path in FILES} <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_rooms_before_its_own(path: Path) -> None:
    own = room(path)
    others = rooms_of(path) - {own}
    assert others <= set(ORDER[: ORDER.index(own)])
    assert not {(own, other) for other in others} & APART


@pytest.mark.parametrize(("rooms", "package"), [(WITHOUT_LIGHTNING, "lightning"), (WITHOUT_TORCH, "torch")])
def test_networks_and_streams_do_without(rooms: tuple[str, ...], package: str) -> None:
    files = [p for name in rooms for p in ([ROOT / name] if name.endswith(".py") else (ROOT / name).glob("*.py"))]
    assert len(files) >= len(rooms)
    for path in files:
        assert package not in {name.split(".")[0] for name in imported(path)}, path


def test_no_two_modules_share_a_name() -> None:
    names = [path.parent.name if path.stem == "__init__" else path.stem for path in FILES]
    assert [name for name, count in Counter(names).items() if count > 1] == []
