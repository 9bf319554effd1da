"""Where figures were measured: machine, commit, versions, and the bandwidth that floors are told against."""

import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that this machine reads and writes while it copies 256 MiB, best of ten."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(10):
        with timed(device) as seconds:
            target.copy_(source)
        best = min(best, seconds[0])
    return 2 * source.numel() * source.element_size() / best


@contextmanager
def timed(device: torch.device) -> Iterator[list[float]]:
    """Seconds of the block, all of its kernels included."""
    seconds: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    yield seconds
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds.append(time.perf_counter() - began)


def commit() -> str | None:
    """The checkout's commit, None outside of one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def hardware(place: torch.device) -> dict[str, Any]:
    """What the figures were made on."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": _processor(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if place.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(place)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on, where they are installed."""
    found = {}
    for package in ("dsmr", "torch", "x-transformers", "perceiver-ar-pytorch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
