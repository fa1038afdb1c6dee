"""Launch settings of the Triton kernels for each chip: tile sizes, warps and stages, which only this file decides.

The settings are chosen by what the compiled kernels need. `python benchmarks/kernel_resources.py` compiles every
variant for every chip, and prints registers, spills and shared memory; a slow test checks that no variant spills
registers or needs more than its chip has. Of the settings that fit, only a GPU can tell the fastest
(`python benchmarks/gpu.py`).
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
"""Most bytes of shared memory per block, by compute capability (CUDA programming guide, technical specifications)."""

RANK_BLOCK = 64
"""Most ranks that a kernel computes at a time. With more of them beside a tile, registers would spill."""
_LEAST = 16  # rows, columns and ranks that a matrix unit takes at least


@dataclass(frozen=True)
class Launch:
    """One kernel's tile sizes and launch options.

    Attributes:
        block_n: Columns of an output tile. For the product a multiple of 64, because 64 weights share a scale.
        block_k: Depth of one step of the loop over the summed dimension; of the same multiple.
        num_warps, num_stages: Triton's launch options.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launches:
    """Settings of the three kernels, by their names in `nf4_triton`."""

    product: Launch
    to_rank: Launch
    outer: Launch


ON_MATRIX_UNITS = Launches(product=Launch(128, 64, 8, 3), to_rank=Launch(128, 64, 4, 3), outer=Launch(128, 64, 4, 3))
_WITHOUT = Launches(product=Launch(64, 64, 8, 1), to_rank=Launch(64, 32, 8, 1), outer=Launch(32, 64, 8, 1))
_WITHOUT_ON_10 = replace(_WITHOUT, product=Launch(64, 64, 4, 1))  # with eight warps one variant spilled there


def launches_of(capability: tuple[int, int], dtype: torch.dtype, tile_rows: int) -> Launches | None:
    """Return the settings for a chip, a dtype and the rows of a tile; None if the kernels are not used there.

    Triton has no matrix instructions for chips before 8.0, nor for exact float32 products on any chip. Without them the
    kernels are used only for the smallest tile, which generating has. Larger tiles would spill registers, so torch's
    grouped product computes them.

    Args:
        capability: The chip's compute capability.
        tile_rows: Rows of a tile, 16 to 128.
    """
    if capability >= (8, 0) and dtype != torch.float32:
        return ON_MATRIX_UNITS
    if tile_rows != _LEAST:
        return None
    return _WITHOUT_ON_10 if capability[0] == 10 else _WITHOUT


def rank_block(rank: int) -> int:
    """Return the number of ranks that a kernel computes at a time, a power of two from 16 to 64.

    Ranks 8, 24, 64 and 100 give 16, 32, 64 and 64. Columns of a block beyond the rank are masked.
    """
    return min(RANK_BLOCK, max(_LEAST, 1 << (rank - 1).bit_length()))
