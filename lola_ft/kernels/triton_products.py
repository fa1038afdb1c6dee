"""Grouped products by our Triton kernels: a 4-bit weight is decoded inside the product and never dense in memory."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lola_ft.kernels import nf4_triton
from lola_ft.kernels.grouping import Grouping
from lola_ft.kernels.launch_settings import ON_MATRIX_UNITS, Launch, Launches, launches_of, rank_block
from lola_ft.kernels.products import GroupedMatmuls, Side
from lola_ft.kernels.stacks import NF4Stack, WeightStack

_LARGEST_RANK = 1024  # a recipe's; what is beyond is a whole weight's gradient


class TritonProducts:
    """See `Products`. Of the weights only `nf4` is read.

    Args:
        product: How the product is launched, in place of what suits the chip.
        capability: Launch for this chip, in place of the device's own.
    """

    recomputes_activations = True

    def __init__(self, product: Launch | None = None, capability: tuple[int, int] | None = None) -> None:
        self._own, self._capability = product, capability

    def takes(self, nf4: NF4Stack, x: Tensor, tile_rows: int) -> bool:
        """Tell whether a weight's blocks of scales lie within its rows, and the kernels suit the chip."""
        return nf4.shape[1] % nf4_triton.BLOCK.value == 0 and self._launches(x, tile_rows) is not None

    def _launches(self, x: Tensor, tile_rows: int) -> Launches | None:
        launches: Launches | None = ON_MATRIX_UNITS  # interpreted on a CPU, where nothing has to fit
        if x.is_cuda or self._capability:
            capability = self._capability or torch.cuda.get_device_capability(x.device)
            launches = launches_of(capability, x.dtype, tile_rows)
        return replace(launches, product=self._own) if launches and self._own else launches

    def _chosen(self, x: Tensor, groups: Grouping) -> Launches:
        launches = self._launches(x, groups.tile_rows)
        assert launches is not None, "the kernels are not used on this chip"
        return launches

    def times(self, x_NI: Tensor, weight: WeightStack, groups: Grouping, side: Side | None) -> Tensor:
        return self._product(x_NI, weight, groups, side, forward=True)

    def times_transposed(self, x_NO: Tensor, weight: WeightStack, groups: Grouping, side: Side | None) -> Tensor:
        return self._product(x_NO, weight, groups, side, forward=False)

    def to_rank(self, x_NI: Tensor, factor_ERI: Tensor, groups: Grouping) -> Tensor:
        rank, launch = factor_ERI.shape[1], self._chosen(x_NI, groups).to_rank
        out_NR = x_NI.new_empty(x_NI.shape[0], rank)
        nf4_triton.to_rank[(groups.expert_of_tile.numel(), -(-rank // rank_block(rank)))](
            x_NI,
            factor_ERI,
            out_NR,
            groups.expert_of_tile,
            x_NI.shape[1],
            *factor_ERI.stride(),
            rank,
            NUM_EXPERTS=factor_ERI.shape[0],
            RANK=rank_block(rank),
            BLOCK_M=groups.tile_rows,
            BLOCK_K=launch.block_k,
            PRECISION=_precision(x_NI),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        return out_NR

    def outer(self, left_NR: Tensor, right_NI: Tensor, groups: Grouping) -> Tensor:
        rank, columns, num_experts = left_NR.shape[1], right_NI.shape[1], groups.ends_E.numel()
        if rank > _LARGEST_RANK:  # a whole weight's gradient
            return GroupedMatmuls().outer(left_NR, right_NI, groups)
        launch = self._chosen(left_NR, groups).outer
        out_ERI = left_NR.new_empty(num_experts, rank, columns)
        nf4_triton.outer[(num_experts, -(-columns // launch.block_n), -(-rank // rank_block(rank)))](
            left_NR,
            right_NI,
            out_ERI,
            groups.starts_E,
            groups.ends_E,
            rank,
            columns,
            RANK=rank_block(rank),
            BLOCK_M=groups.tile_rows,
            BLOCK_N=launch.block_n,
            PRECISION=_precision(left_NR),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        return out_ERI

    def _product(self, x: Tensor, weight: WeightStack, groups: Grouping, side: Side | None, forward: bool) -> Tensor:
        nf4, bias, launch = weight.nf4, weight.bias if forward else None, self._chosen(x, groups).product
        assert nf4 is not None, "these kernels read 4-bit weights"
        out = x.new_empty(x.shape[0], weight.out_features if forward else weight.in_features)
        inputs_first = (weight.in_features, weight.out_features)
        rows, columns = inputs_first if weight.is_transposed else inputs_first[::-1]
        # Pointers that a kernel does not follow are given as some tensor: Triton wants one.
        strides = side.factor_EOR.stride() if side else (0, 0, 0)
        rank = side.hidden_NR.shape[1] if side else 0
        nf4_triton.product[(groups.expert_of_tile.numel(), -(-out.shape[1] // launch.block_n))](
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
            SIDE_BY_SIDE=weight.is_transposed,
            TRANSPOSED=weight.is_transposed != forward,
            HAS_BIAS=bias is not None,
            RANK=rank_block(rank) if rank else 0,
            MANY_RANKS=bool(rank) and rank > rank_block(rank),
            HAS_KEEP=side is not None and side.keep_NO is not None,
            BLOCK_M=groups.tile_rows,
            BLOCK_N=launch.block_n,
            BLOCK_K=launch.block_k,
            PRECISION=_precision(x),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        return out


def _precision(x: Tensor) -> Any:
    """float32 is multiplied as float32, never as TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
