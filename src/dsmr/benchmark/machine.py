"""Describe where a result was measured: machine, commit, package versions and memory bandwidth."""

import math
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dsmr.cost.measuring import timed


def copy_bandwidth(device: torch.device) -> float:
    """Measure bytes read and written per second while copying 256 MiB; best of ten."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(10):
        with timed(device) as seconds:
            target.copy_(source)
        best = min(best, seconds[0])
    return 2 * source.numel() * source.element_size() / best


def current_commit() -> str | None:
    """Return the commit of the checkout, marked if dirty; None outside a checkout."""
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


def hardware_info(device: torch.device) -> dict[str, Any]:
    """Describe the CPU, and the GPU if the device is one."""
    info: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": _processor_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(device)
    return info


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that results depend on."""
    versions = {}
    for package in ("dsmr", "torch", "x-transformers", "perceiver-ar-pytorch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
