"""Describe where a result was measured: machine, commit, package versions and memory bandwidth."""

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dsmr.cost.measuring import timed


def copy_bandwidth(device: torch.device) -> float:
    """Measure bytes read and written per second while copying 256 MiB; best of ten."""
    source = torch.ones(2**26, device=device)
    target, tries = torch.empty_like(source), []
    for _ in range(10):
        with timed(device) as seconds:
            target.copy_(source)
        tries += seconds
    return 2 * source.nbytes / min(tries)


def current_commit() -> str | None:
    """Return the commit of the checkout, marked if dirty; None outside a checkout."""
    git, here = ["git", "describe", "--always", "--dirty"], Path(__file__).resolve().parent
    try:
        return subprocess.run(git, cwd=here, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


def hardware_info(device: torch.device) -> dict[str, Any]:
    """Describe the CPU, and the GPU if the device is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        processor = platform.processor()
    info: dict[str, Any] = {"machine": platform.machine(), "processor": processor, "cpu_cores": os.cpu_count()}
    info["threads"] = torch.get_num_threads()
    return info | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that results depend on."""
    versions = {}
    for package in ("dsmr", "torch", "x-transformers", "perceiver-ar-pytorch"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
