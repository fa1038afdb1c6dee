"""The number format that a run computes in: the recipe's, if this machine supports it."""

from dataclasses import dataclass

import torch

from lola_ft.errors import UserError
from lola_ft.kernels.precision import DTYPES, has_bfloat16


@dataclass(frozen=True)
class Precision:
    """The dtype of the weights that are not quantised, the trainer's autocast, and a note for the user.

    Adapter weights and a tuned router are always float32; norms and the loss are always computed in float32.
    """

    dtype: torch.dtype
    note: str = ""

    @property
    def bf16(self) -> bool:
        return self.dtype == torch.bfloat16

    @property
    def fp16(self) -> bool:
        return self.dtype == torch.float16


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """Choose the precision for a recipe's `base.dtype` on this device.

    bfloat16 becomes float32 if the machine only emulates bfloat16, which is hundreds of times slower on such CPUs.

    Raises:
        UserError: The dtype is float16 on a CPU, whose float16 kernels are too slow to be useful.
    """
    if wanted == "float16" and device.type == "cpu":
        raise UserError("base.dtype: float16 needs a GPU. On a CPU use bfloat16, or float32 if the CPU lacks bfloat16.")
    if wanted == "bfloat16" and not has_bfloat16(device):
        return Precision(torch.float32, f"This {device.type} has no bfloat16 units; computing in float32.")
    return Precision(DTYPES[wanted])
