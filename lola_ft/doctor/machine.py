"""Facts about the machine."""

import platform
from typing import Any

from lola_ft.environment import cpu_name, usable_cores


def machine() -> dict[str, Any]:
    """CPU, memory and GPU, as plain values; what cannot be told is None."""
    facts: dict[str, Any] = {"system": platform.platform(), "cpu": cpu_name(), "cores": usable_cores()}
    try:
        import psutil

        facts["memory_gb"] = round(psutil.virtual_memory().total / 1e9, 1)
    except ImportError:
        facts["memory_gb"] = None
    try:
        import torch
    except ImportError:
        return facts | {"cpu_bfloat16": None, "gpu": None}
    from lola_ft.kernels.precision import has_bfloat16

    facts["cpu_bfloat16"] = bool(has_bfloat16(torch.device("cpu")))
    facts["gpu"] = _gpu() if torch.cuda.is_available() else None
    return facts


def _gpu() -> dict[str, Any]:
    import torch

    from lola_ft.kernels.precision import has_bfloat16

    return {
        "name": torch.cuda.get_device_name(0),
        "count": torch.cuda.device_count(),
        "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        "bfloat16": bool(has_bfloat16(torch.device("cuda"))),
    }
