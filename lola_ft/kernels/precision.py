"""The dtype that an operation computes in, and which the machine has."""

import torch
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What weights may be held and computed in, by the names that recipes and options have."""

_COMPARED_IN_FLOAT32_BYTES = 4_000_000_000


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype on x's device where autocast is on, else x's own."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively; a CPU that emulates it is hundreds of times slower in it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def comparison_dtype(parameters: int, wanted: torch.dtype, device: torch.device) -> torch.dtype:
    """What two models are compared in: float32 if they are small or the device only emulates `wanted`, else that."""
    emulated = wanted == torch.bfloat16 and not has_bfloat16(device)
    return torch.float32 if is_small(parameters) or emulated else wanted


def is_small(parameters: int) -> bool:
    """Whether a model's float32 weights fit wherever it is fine-tuned, so that a comparison may hold them."""
    return parameters * torch.float32.itemsize <= _COMPARED_IN_FLOAT32_BYTES
