"""What a weight is after NF4 rounding, exactly as 4-bit loading would have it."""

import torch
from torch import Tensor

from lola_ft.model.layout import place_of
from lola_ft.quantization.nf4 import dequantize, dynamic_code, quantize


def nf4_rounded(hub_key: str, weight: Tensor) -> Tensor:
    """The dequantised weight in float32, of a tensor that 4-bit loading quantises.

    Each expert is rounded in its in×out orientation, a linear layer in the out×in one that the model holds.
    """
    transposed = place_of(hub_key).transposed
    oriented = weight.t().contiguous() if transposed else weight
    rounded = dequantize(quantize(oriented), dynamic_code(), tuple(oriented.shape), torch.float32)
    return rounded.t().contiguous() if transposed else rounded
