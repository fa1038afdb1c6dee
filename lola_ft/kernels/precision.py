"""The dtype that an operation computes in, and the dtypes that a device supports natively."""

import torch
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""The dtypes of weights and computation, by their names in recipes and options."""

_COMPARED_IN_FLOAT32_BYTES = 4_000_000_000


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's dtype for x's device if autocast is on, else x's dtype."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def has_bfloat16(device: torch.device) -> bool:
    """Return True if the device multiplies bfloat16 natively. A CPU that emulates it is hundreds of times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def comparison_dtype(parameters: int, wanted: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compare two models in: float32 if they are small or `wanted` is only emulated, else `wanted`.

    Args:
        parameters: Number of parameters of one model.
    """
    emulated = wanted == torch.bfloat16 and not has_bfloat16(device)
    return torch.float32 if is_small(parameters) or emulated else wanted


def is_small(parameters: int) -> bool:
    """Return True if a model's float32 weights (4 bytes per parameter) take 4 GB at most: cheap to compare."""
    return parameters * torch.float32.itemsize <= _COMPARED_IN_FLOAT32_BYTES
