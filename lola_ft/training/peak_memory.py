"""The most memory that a run has held, and how that was measured."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

_STATUS = Path("/proc/self/status")


class PeakMemory(TrainerCallback):
    """Looks at the process after every step; a GPU keeps its own record."""

    def __init__(self) -> None:
        self._anonymous = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._anonymous = max(self._anonymous, process_mb().get("RssAnon", 0.0))

    def as_dict(self) -> dict[str, Any]:
        """For the manifest, in MB."""
        found: dict[str, Any] = {}
        if process_mb():
            found["anonymous_mb"] = round(max(self._anonymous, process_mb()["RssAnon"]), 1)
            found["resident_mb"] = round(process_mb()["VmHWM"], 1)
        how = {
            "anonymous_mb": "largest RssAnon that Linux tells of the process after a step",
            "resident_mb": "VmHWM that Linux tells of the process, pages of mapped files included",
        }
        if torch.cuda.is_available():
            found["gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
            how["gpu_mb"] = "torch.cuda.max_memory_allocated"
        return found | {"measured": {key: how[key] for key in found}}


def memory_now() -> str:
    """What is held now, for the progress bar; "" where nothing tells."""
    if torch.cuda.is_available():
        return f"{torch.cuda.memory_allocated() / 2**30:.1f}G"
    return f"{process_mb()['VmRSS'] / 1024:.1f}G" if process_mb() else ""


def process_mb() -> dict[str, float]:
    """Sizes from /proc/self/status in MB, by their names there; {} where there is none (not Linux)."""
    if not _STATUS.exists():
        return {}
    lines = (line.split() for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return {fields[0].rstrip(":"): int(fields[1]) / 1024 for fields in lines if fields[-1] == "kB"}
