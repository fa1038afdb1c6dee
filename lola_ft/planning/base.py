"""What a loaded base takes, counted from its config as `quantization/audit.py` counts a model."""

from math import prod

from lola_ft.families.parts import Audit, part_of
from lola_ft.kernels.nf4_sizes import packed_sizes
from lola_ft.kernels.precision import DTYPES
from lola_ft.model.config import LolaConfig
from lola_ft.model.hub_checkpoint import expected_shapes
from lola_ft.model.layout import is_quantized

_CODE_BYTES = 16 * 4  # bitsandbytes' table of the 16 values of NF4, one a linear layer
_SCALE_CODE_BYTES = 256 * 4  # the table of the scales' 256 values, one a linear layer or layer of experts
_FLOAT = 4


def base_audit(config: LolaConfig, quantization: str | None, dtype: str) -> Audit:
    """Parameters and bytes by part and format; the same as an audit of the loaded model."""
    result = Audit()
    for name, shape in expected_shapes(config).items():
        kind, num_bytes = dtype, prod(shape) * DTYPES[dtype].itemsize
        if quantization == "nf4" and is_quantized(name):
            kind = "nf4"
            num_bytes = nf4_bytes(prod(shape)) if ".experts." in name else nf4_linear_bytes(prod(shape))
        count = result.counts[part_of(name), kind]
        count.parameters += prod(shape)
        count.num_bytes += num_bytes
    if quantization == "nf4":
        moe_layers = sum(map(config.is_moe_layer, range(config.n_layer)))
        if moe_layers:
            result.counts["experts", "nf4"].num_bytes += moe_layers * _SCALE_CODE_BYTES
    return result


def nf4_bytes(numel: int) -> int:
    """Codes, their scales, the scales' scales and their mean; without tables."""
    packed, blocks, superblocks = packed_sizes(numel)
    return packed + blocks + _FLOAT * superblocks + _FLOAT


def nf4_linear_bytes(numel: int) -> int:
    """Of a linear layer's weight, with its tables."""
    return nf4_bytes(numel) + _CODE_BYTES + _SCALE_CODE_BYTES
