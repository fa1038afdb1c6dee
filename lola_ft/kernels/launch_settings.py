"""How the Triton kernels are launched on each chip: the one place that decides tile sizes, warps and stages.

A setting is chosen by what the compiler makes of it: `python benchmarks/kernel_resources.py` compiles every variant for
every chip and prints registers, spills and shared memory, and a slow test holds that no variant spills or needs more
than its chip has. (Which of the settings that fit is fastest, only a GPU can tell: `python benchmarks/gpu.py`.)
"""

from dataclasses import dataclass, replace

import torch

SHARED_BYTES = {
    (7, 5): 64 * 1024,
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (12, 0): 99 * 1024,
}
"""Shared memory that a block may have, by compute capability (CUDA programming guide, technical specifications)."""

RANK_BLOCK = 64
"""Ranks that a kernel takes at a time: more of them beside a tile would spill registers."""
_LEAST = 16  # rows, columns and ranks that a matrix unit takes


@dataclass(frozen=True)
class Launch:
    """One kernel's tile and its threads.

    Attributes:
        block_n: Columns of an output tile; of the product a multiple of 64, the weights that share a scale.
        block_k: Depth of one turn of the K loop; likewise.
        num_warps, num_stages: As Triton takes them.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launches:
    """Settings of the three kernels."""

    product: Launch
    to_rank: Launch
    outer: Launch


ON_MATRIX_UNITS = Launches(product=Launch(128, 64, 8, 3), to_rank=Launch(128, 64, 4, 3), outer=Launch(128, 64, 4, 3))
_WITHOUT = Launches(product=Launch(64, 64, 8, 1), to_rank=Launch(64, 32, 8, 1), outer=Launch(32, 64, 8, 1))
_WITHOUT_ON_10 = replace(_WITHOUT, product=Launch(64, 64, 4, 1))  # with eight warps one variant spilled there


def launches_of(capability: tuple[int, int], dtype: torch.dtype, tile_rows: int) -> Launches | None:
    """Return the settings for a chip and the rows of a tile; None where the kernels are not used.

    Triton has no matrix instructions for chips before 8.0, nor for exact float32 products on any chip. Without them
    only the smallest tile is left, which decoding has: the others spill, and matrix units would be many times faster.
    """
    if capability >= (8, 0) and dtype != torch.float32:
        return ON_MATRIX_UNITS
    if tile_rows != _LEAST:
        return None
    return _WITHOUT_ON_10 if capability[0] == 10 else _WITHOUT


def rank_block(rank: int) -> int:
    """Return how many ranks a kernel takes at a time: a power of two; what is beyond the rank is masked."""
    return min(RANK_BLOCK, max(_LEAST, 1 << (rank - 1).bit_length()))
