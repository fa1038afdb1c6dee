"""What a loaded dense model takes, as `quantization/audit.py` counts it."""

from math import prod

from lola_ft.families.parts import Audit, part_of
from lola_ft.kernels.precision import DTYPES
from lola_ft.planning.base import nf4_linear_bytes
from lola_ft.planning.dense.config import DenseConfig


def dense_audit(config: DenseConfig, quantization: str | None, dtype: str) -> Audit:
    """Parameters and bytes by part and format; the same as an audit of the loaded model."""
    result = Audit()
    for name, shape in config.shapes.items():
        four_bit = quantization == "nf4" and config.group_of(name) is not None
        count = result.counts[part_of(name), "nf4" if four_bit else dtype]
        count.parameters += prod(shape)
        count.num_bytes += nf4_linear_bytes(prod(shape)) if four_bit else prod(shape) * DTYPES[dtype].itemsize
    return result
