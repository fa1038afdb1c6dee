"""The number format that a run computes in: the recipe's, where this machine has it."""

from dataclasses import dataclass

import torch

from lola_ft.errors import UserError
from lola_ft.kernels.precision import DTYPES, has_bfloat16


@dataclass(frozen=True)
class Precision:
    """The dtype of everything that stays dense, the trainer's autocast, and what the user should know.

    Adapter weights and a tuned router are float32 in every case; norms and the loss are computed in float32 too.
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

    bfloat16 falls back to float32 where the machine only emulates it (hundreds of times slower on such CPUs).

    Raises:
        UserError: For float16 on a CPU, which has no kernels for it worth using.
    """
    if wanted == "float16" and device.type == "cpu":
        raise UserError("base.dtype: float16 needs a GPU. On a CPU use bfloat16 (float32 where it lacks bfloat16).")
    if wanted == "bfloat16" and not has_bfloat16(device):
        return Precision(torch.float32, f"This {device.type} has no bfloat16 units; computing in float32.")
    return Precision(DTYPES[wanted])
