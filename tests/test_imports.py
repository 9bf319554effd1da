"""Imports go one way: data and model never import each other, and nothing imports the command line."""

import ast
from pathlib import Path

import pytest

import dsmr

ROOT = Path(dsmr.__file__).parent
ALLOWED = {
    "files": set(),
    "metrics_csv": {"files"},
    "data": {"files"},
    "model": set(),
    "metrics": set(),
    "optim": set(),
    "checkpoint": {"model", "exported"},
    "pieces": {"files"},
    "module": {"model", "metrics", "optim", "checkpoint", "pieces"},
    "analyze": {"model", "data", "metrics", "module", "pieces"},
    "checkpoint_io": {"files"},
    "exported": set(),
    "export": {"checkpoint", "data", "exported", "model", "report"},
    "generate": {"model", "data", "checkpoint", "module", "optim"},
    "audio": set(),
    "evaluate": {"data", "generate"},
    "report": {"model", "checkpoint", "evaluate", "analyze", "pieces"},
    "devices": set(),
    "measure": set(),
    "rows": {"model"},
    "estimate": {"model", "devices"},
    "callbacks": {
        "model",
        "metrics",
        "metrics_csv",
        "files",
        "module",
        "checkpoint",
        "data",
        "generate",
        "report",
        "devices",
        "measure",
        "pieces",
    },
    "peers": set(),
    "benchmark": {"model", "module", "data", "peers", "rows", "measure"},
    "__main__": {"cli"},
    "cli": {
        "data",
        "files",
        "metrics_csv",
        "model",
        "metrics",
        "module",
        "callbacks",
        "generate",
        "evaluate",
        "checkpoint",
        "checkpoint_io",
        "exported",
        "export",
        "audio",
        "optim",
        "report",
        "devices",
        "rows",
        "estimate",
        "benchmark",
        "pieces",
        "analyze",
    },
}
WITHOUT_LIGHTNING = (
    "model",
    "data/tokenizer.py",
    "data/store.py",
    "data/lanes.py",
    "data/windows.py",
    "data/synthetic.py",
)
WITHOUT_TORCH = (
    "model/horizons.py",
    "model/schedules.py",
    "data/tokenizer.py",
    "data/store.py",
    "data/maestro.py",
    "data/folder.py",
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


FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_room_may(path: Path) -> None:
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("dsmr.")}
    assert rooms - {room(path)} <= ALLOWED[room(path)]


@pytest.mark.parametrize(("rooms", "package"), [(WITHOUT_LIGHTNING, "lightning"), (WITHOUT_TORCH, "torch")])
def test_networks_and_streams_do_without(rooms: tuple[str, ...], package: str) -> None:
    files = [p for name in rooms for p in ([ROOT / name] if name.endswith(".py") else (ROOT / name).glob("*.py"))]
    assert len(files) >= len(rooms)
    for path in files:
        assert package not in {name.split(".")[0] for name in imported(path)}, path
