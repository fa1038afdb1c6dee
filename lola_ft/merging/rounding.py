"""What a weight is after NF4 rounding, exactly as 4-bit loading would have it."""

from torch import Tensor

from lola_ft.model.layout import EXPERT_PROJECTIONS, LINEAR_MODULES, place_of
from lola_ft.quantization.nf4 import dequantize, dynamic_code, quantize


def nf4_rounded(hub_key: str, weight: Tensor) -> Tensor:
    """The dequantised weight in float32 if 4-bit loading quantises this tensor, else the weight itself.

    Each expert is rounded in its in×out orientation, a linear layer in the out×in one that the model holds.
    """
    place = place_of(hub_key)
    if not _is_quantized(hub_key):
        return weight
    oriented = weight.t().contiguous() if place.transposed else weight
    rounded = dequantize(quantize(oriented), dynamic_code(), tuple(oriented.shape), weight.float().dtype)
    return rounded.t().contiguous() if place.transposed else rounded


def _is_quantized(hub_key: str) -> bool:
    names = (*LINEAR_MODULES, *EXPERT_PROJECTIONS)
    return any(hub_key.endswith(f"{name}.weight") for name in names)
