"""Sizes of the tensors that hold one NF4 weight, for the code that stores it and the planner.

A weight of 4096 x 1024 values: 2,097,152 bytes of codes, 65,536 bytes of scales (one per block of 64 values) and 256
float32 scales of scales (one per 256 blocks).
"""

BLOCK = 64
ABSMAX_BLOCK = 256


def packed_sizes(numel: int) -> tuple[int, int, int]:
    """Return the lengths of `packed`, `absmax` and `absmax2` for a weight of `numel` values."""
    blocks = -(-numel // BLOCK)
    return -(-numel // 2), blocks, -(-blocks // ABSMAX_BLOCK)
