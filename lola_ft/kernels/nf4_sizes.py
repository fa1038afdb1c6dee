"""Sizes of the tensors that hold one NF4 weight, for the code that stores it and the planner.

A weight of 4096 x 1024 values: 2,097,152 bytes of codes, 65,536 bytes of scales (one per block of 64 values) and 256
float32 scales of scales (one per 256 blocks).
"""

from collections.abc import Iterable

BLOCK = 64
ABSMAX_BLOCK = 256
LAYERS_ON_DEVICE = 2
"""Layers of offloaded experts that have a buffer on the device: one computes while the next is copied."""
_ALIGNMENT = 256  # bytes; tensors that kernels read start at multiples of it


def packed_sizes(numel: int) -> tuple[int, int, int]:
    """Return the lengths of `packed`, `absmax` and `absmax2` for a weight of `numel` values."""
    blocks = -(-numel // BLOCK)
    return -(-numel // 2), blocks, -(-blocks // ABSMAX_BLOCK)


def starts_of_store(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Return the start of each tensor in one piece of memory that holds them all, and the size of this memory.

    Tensors of 1000, 256 and 4 bytes start at 0, 1024 and 1280, in 1536 bytes.

    Args:
        sizes: Bytes of each tensor.
    """
    starts, end = list[int](), 0
    for size in sizes:
        starts.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return starts, end
