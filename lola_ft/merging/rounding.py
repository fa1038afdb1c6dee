"""NF4 rounding of a weight, with exactly the values that 4-bit loading gives."""

import torch
from torch import Tensor

from lola_ft.families import Place
from lola_ft.quantization.nf4 import dequantize, dynamic_code, quantize


def nf4_rounded(place: Place, weight: Tensor) -> Tensor:
    """Quantise and dequantise a tensor that 4-bit loading quantises; return float32 in the given orientation.

    Blocks of NF4 follow memory order, so orientation matters: an expert is rounded in the orientation of its file, a
    linear layer as out×in, as the model holds it.
    """
    oriented = weight.t().contiguous() if place.transposed else weight
    rounded = dequantize(quantize(oriented), dynamic_code(), tuple(oriented.shape), torch.float32)
    return rounded.t().contiguous() if place.transposed else rounded
