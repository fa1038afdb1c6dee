"""Products of grouped rows, one expert after another: the way of a CPU, and the reference of the others.

Expert weights are asked for one tile at a time, so that a 4-bit weight is dense only while it is used. The narrow
products of LoRA are one for all experts where that is quicker than a call for each.

Shapes: N rows of the grouped buffer, E experts, I and O a weight's rows and columns, R rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lola_ft.kernels.grouping import Grouping
from lola_ft.kernels.products import Side
from lola_ft.kernels.stacks import WeightStack
from lola_ft.kernels.tiles import Tiles, times, times_transposed

_MOST_JOINT = 1 << 26
"""Multiplications of all rows with one expert's factor up to which a product with all factors is quicker than calls."""


class LoopProducts:
    """See `Products`."""

    recomputes_activations = False

    def times(self, x_NI: Tensor, weight: WeightStack, groups: Grouping, side: Side | None) -> Tensor:
        out_NO = _empty_rows(x_NI, weight.out_features, groups)
        bias_EO = None if weight.bias is None else weight.bias.to(x_NI.dtype)
        joint = side is not None and _takes_jointly(side, out_NO)
        first_EO = None if joint else bias_EO  # what the products are added to
        multiply = times if weight.is_transposed else times_transposed
        for e, i, j, tiles in _with_tiles(weight, groups, x_NI.dtype):
            if first_EO is not None:
                out_NO[i:j] = first_EO[e]
            multiply(x_NI[i:j], tiles, out_NO[i:j], add=first_EO is not None)
        if side is not None:
            _add_side(out_NO, side, groups, bias_EO if joint else None)
        return out_NO

    def times_transposed(self, x_NO: Tensor, weight: WeightStack, groups: Grouping, side: Side | None) -> Tensor:
        out_NI = _empty_rows(x_NO, weight.in_features, groups)
        multiply = times_transposed if weight.is_transposed else times
        for _, i, j, tiles in _with_tiles(weight, groups, x_NO.dtype):
            multiply(x_NO[i:j], tiles, out_NI[i:j])
        if side is not None:
            _add_side(out_NI, side, groups, None)
        return out_NI

    def to_rank(self, x_NI: Tensor, factor_ERI: Tensor, groups: Grouping) -> Tensor:
        num_experts, rank, _ = factor_ERI.shape
        if _is_joint(x_NI, rank):
            all_NER = (x_NI @ factor_ERI.flatten(0, 1).t()).view(-1, num_experts, rank)
            return all_NER[torch.arange(all_NER.shape[0]), groups.expert_of_row()]
        out_NR = _empty_rows(x_NI, rank, groups)
        for e, i, j in groups.spans():
            torch.mm(x_NI[i:j], factor_ERI[e].t(), out=out_NR[i:j])
        return out_NR

    def outer(self, left_NR: Tensor, right_NI: Tensor, groups: Grouping) -> Tensor:
        num_experts, rank = groups.ends_E.numel(), left_NR.shape[1]
        if _is_joint(right_NI, rank):
            return (_widened(left_NR, groups).t() @ right_NI).view(num_experts, rank, -1)
        out_ERI = left_NR.new_zeros(num_experts, rank, right_NI.shape[1])
        for e, i, j in groups.spans():
            torch.mm(left_NR[i:j].t(), right_NI[i:j], out=out_ERI[e])
        return out_ERI


def _empty_rows(like: Tensor, columns: int, groups: Grouping) -> Tensor:
    """Rows to fill; those that no expert has are zeros, for joint products take them all."""
    rows = like.new_empty(like.shape[0], columns)
    rows[int(groups.ends_E[-1]) :] = 0
    return rows


def _with_tiles(weight: WeightStack, groups: Grouping, dtype: torch.dtype) -> Iterator[tuple[int, int, int, Tiles]]:
    """Each expert that got a token: its number, first row, end row, dense weight as stored."""
    spans = groups.spans()
    for span, tiles in zip(spans, weight.tiles([e for e, _, _ in spans], dtype), strict=True):
        yield *span, tiles


def _add_side(out_NO: Tensor, side: Side, groups: Grouping, bias_EO: Tensor | None) -> None:
    """Add a LoRA side path; in one product with it a bias, if there is one, as a factor of ones."""
    hidden_NR, factor_ERO = side.hidden_NR, side.factor_EOR.transpose(1, 2)
    if _takes_jointly(side, out_NO):
        if bias_EO is not None:
            hidden_NR = torch.cat([hidden_NR, hidden_NR.new_ones(hidden_NR.shape[0], 1)], 1)
            factor_ERO = torch.cat([factor_ERO, bias_EO[:, None]], 1)
        out_NO.addmm_(_widened(hidden_NR, groups), factor_ERO.flatten(0, 1))
        return
    assert bias_EO is None, "a bias is added with the weights unless all is one product"
    for e, i, j in groups.spans():
        if side.keep_NO is None:
            out_NO[i:j].addmm_(hidden_NR[i:j], factor_ERO[e])
        else:
            out_NO[i:j] += hidden_NR[i:j] @ factor_ERO[e] * side.keep_NO[i:j] * side.scale


def _widened(x_NR: Tensor, groups: Grouping) -> Tensor:
    """(N, E*R): each row in the columns of its expert, zeros elsewhere."""
    rows, num_experts = x_NR.shape[0], groups.ends_E.numel()
    wide_NER = x_NR.new_zeros(rows, num_experts, x_NR.shape[1])
    wide_NER[torch.arange(rows), groups.expert_of_row()] = x_NR
    return wide_NER.flatten(1)


def _takes_jointly(side: Side, out_NO: Tensor) -> bool:
    return side.keep_NO is None and _is_joint(out_NO, side.hidden_NR.shape[1])


def _is_joint(wide: Tensor, rank: int) -> bool:
    """Whether one product with all experts' factors, mostly for nothing, is quicker than a call for each.

    In half precision only: a CPU that computes in that has matrix units, where a call costs more than what it does.
    """
    return wide.dtype in (torch.bfloat16, torch.float16) and wide.numel() * rank <= _MOST_JOINT
