"""The versions of libraries and the hardware that lola_ft runs on."""

import functools
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lola_ft import __version__

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate")
"""The libraries that affect a run's numbers."""


def library_versions() -> dict[str, str]:
    """Return the versions of Python, lola_ft and the libraries that affect a run's numbers."""
    versions = {"python": platform.python_version(), "lola-ft": __version__}
    for package in PACKAGES:
        versions[package] = version_of(package) or "not installed"
    return versions


@functools.cache  # reading a package's metadata is slow, and a run looks versions up several times
def version_of(package: str) -> str | None:
    """Return an installed package's version; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """Return facts about this machine's hardware."""
    import torch

    has_gpu = torch.cuda.is_available()
    return {
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpus": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if has_gpu else None,
        "gpu_memory_mb": torch.cuda.get_device_properties(0).total_memory // 2**20 if has_gpu else None,
    }


def cpu_name() -> str:
    """Return the processor's name as its maker writes it, if the system reports it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
