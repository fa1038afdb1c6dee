"""NF4 with double quantisation, by bitsandbytes' operators, for one weight at a time.

A weight is cut into blocks of 64 values in memory order, each with a scale (absmax); the scales are themselves stored
in 8 bits, in blocks of 256, around their mean. 4.127 bits a weight in all.
"""

from dataclasses import dataclass
from math import prod

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

BLOCK = 64
ABSMAX_BLOCK = 256


@dataclass(frozen=True)
class NF4:
    """One quantised weight.

    Attributes:
        packed: Two 4-bit codes a byte, uint8 (numel / 2, rounded up).
        absmax: 8-bit code of each block's scale, uint8 (blocks,).
        absmax2: Scale of each block of scales, float32 (blocks / 256, rounded up).
        offset: Mean of the scales, float32 scalar.
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor
    offset: Tensor


def quantize(weight: Tensor) -> NF4:
    """Quantise a float weight of any shape, in memory order; bit-equal to bitsandbytes' `quantize_4bit`."""
    packed, state = bnb.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    return NF4(packed.view(-1), state.absmax, state.state2.absmax, state.offset)


def dequantize(nf4: NF4, absmax_code: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The dense weight of `shape` in `dtype`.

    Works on the flat weight: bitsandbytes 0.50's CPU operator is wrong for some shapes whose last dimension is not a
    multiple of 64.

    Args:
        absmax_code: `dynamic_code()` on the weight's device.
    """
    absmax = torch.ops.bitsandbytes.dequantize_blockwise.default(
        nf4.absmax, nf4.absmax2, absmax_code, ABSMAX_BLOCK, torch.float32
    )
    absmax += nf4.offset
    flat = torch.ops.bitsandbytes.dequantize_4bit.default(
        nf4.packed.view(-1, 1), absmax, BLOCK, "nf4", (prod(shape),), dtype
    )
    return flat.view(shape)


def dynamic_code() -> Tensor:
    """The 256 values of bitsandbytes' 8-bit type for scales, float32, on the CPU."""
    return bnb.create_dynamic_map()


def packed_sizes(numel: int) -> tuple[int, int, int]:
    """Lengths of `packed`, `absmax` and `absmax2` for a weight of `numel` values."""
    blocks = -(-numel // BLOCK)
    return -(-numel // 2), blocks, -(-blocks // ABSMAX_BLOCK)
