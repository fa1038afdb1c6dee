"""What a weight is after NF4 rounding, exactly as 4-bit loading would have it."""

import torch
from torch import Tensor

from lola_ft.families import Place
from lola_ft.quantization.nf4 import dequantize, dynamic_code, quantize


def nf4_rounded(place: Place, weight: Tensor) -> Tensor:
    """Return the dequantised weight in float32, of a tensor that 4-bit loading quantises.

    Each expert is rounded in the orientation of its file, a linear layer in the out×in one that the model holds.
    """
    oriented = weight.t().contiguous() if place.transposed else weight
    rounded = dequantize(quantize(oriented), dynamic_code(), tuple(oriented.shape), torch.float32)
    return rounded.t().contiguous() if place.transposed else rounded
