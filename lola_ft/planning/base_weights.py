"""The memory of a loaded base, counted from its architecture. `quantization/audit.py` counts the loaded model."""

from math import prod

from lola_ft.families import Architecture
from lola_ft.families.parts import Audit, part_of_group
from lola_ft.kernels.nf4_sizes import packed_sizes
from lola_ft.kernels.precision import DTYPES

_CODE_BYTES = 16 * 4  # bitsandbytes' table of the 16 values of NF4, one per linear layer
_SCALE_CODE_BYTES = 256 * 4  # the table of the scales' 256 values, one per linear layer or layer of experts
_FLOAT = 4


def base_audit(architecture: Architecture, quantization: str | None, dtype: str) -> Audit:
    """Count parameters and bytes by part and number format; equals an audit of the loaded model."""
    result = Audit()
    for place in architecture.places.values():
        numel = prod(place.shape)
        kind = "float32" if place.float32 else dtype
        num_bytes = numel * DTYPES[kind].itemsize
        if quantization == "nf4" and place.quantized:
            kind = "nf4"
            num_bytes = nf4_linear_bytes(numel) if place.expert is None else nf4_bytes(numel)
        count = result.counts[part_of_group(place.group), kind]
        count.parameters += numel
        count.num_bytes += num_bytes
    if quantization == "nf4" and architecture.sizes.moe_layers:
        result.counts["experts", "nf4"].num_bytes += len(architecture.sizes.moe_layers) * _SCALE_CODE_BYTES
    return result


def nf4_bytes(numel: int) -> int:
    """Return the bytes of a weight's NF4 codes, their scales, the scales' scales and mean, without tables."""
    packed, blocks, superblocks = packed_sizes(numel)
    return packed + blocks + _FLOAT * superblocks + _FLOAT


def nf4_linear_bytes(numel: int) -> int:
    """Return the bytes of a linear layer's NF4 weight, including its tables."""
    return nf4_bytes(numel) + _CODE_BYTES + _SCALE_CODE_BYTES
