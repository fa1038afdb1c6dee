"""Grouped products by Triton kernels (`nf4_triton`), which decode a 4-bit weight inside the product.

A launch starts one program per tile of rows and per block of output columns. With 3 experts in tiles of 16 rows,
`expert_of_tile` = [0, 2, 2, 3] and 256 output columns in blocks of 128, that is 4 x 2 programs. Programs of tile 3
return at once, because expert 3 does not exist: the tile is unused.

Shape suffixes: N rows of the grouped buffer, E experts, I inputs and O outputs of the projection, R rank.
"""

from typing import Any

import torch
from torch import Tensor

from lola_ft.kernels import nf4_triton
from lola_ft.kernels.grouping import Grouping
from lola_ft.kernels.products import GroupedMatmuls, Side
from lola_ft.kernels.stacks import NF4Stack, WeightStack

_LEAST = 16  # rows and columns that a matrix unit takes at least
_LARGEST_RANK = 256  # a larger rank would not fit into a program's memory beside the tile


class TritonProducts:
    """Multiply with 4-bit weights. The methods are those of `Products`; only the `nf4` of a weight is read.

    Args:
        block_n: Columns of an output tile.
        block_k: Depth of one step of the loop over the summed dimension.
        num_warps, num_stages: Triton's launch options.
    """

    recomputes_activations = True

    def __init__(self, block_n: int = 128, block_k: int = 64, num_warps: int = 8, num_stages: int = 3) -> None:
        self.block_n, self.block_k = block_n, block_k
        self._options = {"num_warps": num_warps, "num_stages": num_stages}

    @staticmethod
    def takes(nf4: NF4Stack) -> bool:
        """Return True if the kernels can read this weight: each row is a whole number of blocks of 64 values."""
        return nf4.shape[1] % nf4_triton.BLOCK.value == 0

    def times(self, x_NI: Tensor, weight: WeightStack, groups: Grouping, side: Side | None) -> Tensor:
        return self._product(x_NI, weight, groups, side, forward=True)

    def times_transposed(self, x_NO: Tensor, weight: WeightStack, groups: Grouping, side: Side | None) -> Tensor:
        return self._product(x_NO, weight, groups, side, forward=False)

    def to_rank(self, x_NI: Tensor, factor_ERI: Tensor, groups: Grouping) -> Tensor:
        rank = factor_ERI.shape[1]
        out_NR = x_NI.new_empty(x_NI.shape[0], rank)
        nf4_triton.to_rank[(groups.expert_of_tile.numel(),)](
            x_NI,
            factor_ERI,
            out_NR,
            groups.expert_of_tile,
            x_NI.shape[1],
            *factor_ERI.stride(),
            rank,
            NUM_EXPERTS=factor_ERI.shape[0],
            RANK=_rank_block(rank),
            BLOCK_M=groups.tile_rows,
            BLOCK_K=self.block_k,
            PRECISION=_precision(x_NI),
        )
        return out_NR

    def outer(self, left_NR: Tensor, right_NI: Tensor, groups: Grouping) -> Tensor:
        rank, columns, num_experts = left_NR.shape[1], right_NI.shape[1], groups.ends_E.numel()
        if rank > _LARGEST_RANK:  # the gradient of a whole weight, where `left` is as wide as the projection
            return GroupedMatmuls().outer(left_NR, right_NI, groups)
        out_ERI = left_NR.new_empty(num_experts, rank, columns)
        nf4_triton.outer[(num_experts, -(-columns // self.block_n))](
            left_NR,
            right_NI,
            out_ERI,
            groups.starts_E,
            groups.ends_E,
            rank,
            columns,
            RANK=_rank_block(rank),
            BLOCK_M=groups.tile_rows,
            BLOCK_N=self.block_n,
            PRECISION=_precision(left_NR),
        )
        return out_ERI

    def _product(self, x: Tensor, weight: WeightStack, groups: Grouping, side: Side | None, forward: bool) -> Tensor:
        nf4, bias = weight.nf4, weight.bias if forward else None
        assert nf4 is not None, "these kernels read 4-bit weights"
        out = x.new_empty(x.shape[0], weight.out_features if forward else weight.in_features)
        # The stored matrix of one expert, (rows, columns): (in, out) if transposed, else (out, in).
        inputs_first = (weight.in_features, weight.out_features)
        rows, columns = inputs_first if weight.is_transposed else inputs_first[::-1]
        # Triton wants a tensor for every pointer. For those that the kernel does not read, `x` stands in.
        strides = side.factor_EOR.stride() if side else (0, 0, 0)
        rank = side.hidden_NR.shape[1] if side else 0
        nf4_triton.product[(groups.expert_of_tile.numel(), -(-out.shape[1] // self.block_n))](
            x,
            out,
            groups.expert_of_tile,
            nf4.packed,
            nf4.absmax,
            nf4.absmax2,
            nf4.offset,
            nf4.absmax_code,
            nf4.nf4_code,
            x if bias is None else bias,
            side.hidden_NR if side else x,
            side.factor_EOR if side else x,
            x if side is None or side.keep_NO is None else side.keep_NO,
            rows,
            columns,
            nf4.absmax.shape[1],
            nf4.absmax2.shape[1],
            *strides,
            rank,
            side.scale if side else 1.0,
            NUM_EXPERTS=groups.ends_E.numel(),
            PARTS=nf4.parts,
            SIDE_BY_SIDE=weight.is_transposed,  # (in, out) weights: gate and up are the left and right columns
            TRANSPOSED=weight.is_transposed != forward,  # forward wants (in, out), backward (out, in)
            HAS_BIAS=bias is not None,
            RANK=_rank_block(rank) if rank else 0,
            HAS_KEEP=side is not None and side.keep_NO is not None,
            BLOCK_M=groups.tile_rows,
            BLOCK_N=self.block_n,
            BLOCK_K=self.block_k,
            PRECISION=_precision(x),
            **self._options,
        )
        return out


def _rank_block(rank: int) -> int:
    """Return the power of two that a kernel works with, at least 16; columns beyond the rank are masked."""
    assert rank <= _LARGEST_RANK, f"rank {rank} is more than {_LARGEST_RANK}, which these kernels take"
    return max(_LEAST, 1 << (rank - 1).bit_length())


def _precision(x: Tensor) -> Any:
    """Return the `input_precision` of `tl.dot` for x's dtype: float32 is multiplied exactly, never as TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
