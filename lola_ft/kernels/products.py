"""Products of grouped rows with their experts' matrices, in one call for all experts.

Shapes: N rows of the grouped buffer, E experts, I and O a weight's rows and columns, R rank.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lola_ft.kernels.grouping import Grouping
from lola_ft.kernels.stacks import WeightStack


@dataclass(frozen=True)
class Side:
    """What a LoRA side path adds to a product's output: `hidden @ factor[expert].T`, dropped where `keep` is False.

    Attributes:
        hidden_NR: (N, R).
        factor_EOR: (E, outputs, R), any strides.
        keep_NO: (N, outputs) bool; None without dropout.
        scale: What is kept is multiplied by.
    """

    hidden_NR: Tensor
    factor_EOR: Tensor
    keep_NO: Tensor | None = None
    scale: float = 1.0


class Products(Protocol):
    """One way to multiply. Rows beyond the last expert's group hold anything afterwards.

    Attributes:
        recomputes_activations: Whether activations are computed again in backward, and not kept, because that is
            cheap there.
    """

    recomputes_activations: bool

    def times(self, x_NI: Tensor, weight: WeightStack, groups: Grouping, side: Side | None) -> Tensor:
        """`x @ weight[expert] + bias[expert]` and the side path; (N, O)."""

    def times_transposed(self, x_NO: Tensor, weight: WeightStack, groups: Grouping, side: Side | None) -> Tensor:
        """`x @ weight[expert].T` and the side path; (N, I)."""

    def to_rank(self, x_NI: Tensor, factor_ERI: Tensor, groups: Grouping) -> Tensor:
        """`x @ factor[expert].T`; (N, R)."""

    def outer(self, left_NR: Tensor, right_NI: Tensor, groups: Grouping) -> Tensor:
        """`left.T @ right` over each expert's rows; (E, R, I), zeros for an expert without a token."""


class GroupedMatmuls:
    """torch's grouped matrix product on dense weights; 4-bit ones are made dense for all experts of a layer at once."""

    recomputes_activations = True

    def times(self, x_NI: Tensor, weight: WeightStack, groups: Grouping, side: Side | None) -> Tensor:
        dense = weight.dense(x_NI.dtype)
        out_NO = F.grouped_mm(x_NI, dense if weight.is_transposed else dense.transpose(1, 2), offs=groups.ends_E)
        if weight.bias is not None:
            out_NO += weight.bias.to(x_NI.dtype)[groups.expert_of_row()]
        return _with_side(out_NO, side, groups)

    def times_transposed(self, x_NO: Tensor, weight: WeightStack, groups: Grouping, side: Side | None) -> Tensor:
        dense = weight.dense(x_NO.dtype)
        out_NI = F.grouped_mm(x_NO, dense.transpose(1, 2) if weight.is_transposed else dense, offs=groups.ends_E)
        return _with_side(out_NI, side, groups)

    def to_rank(self, x_NI: Tensor, factor_ERI: Tensor, groups: Grouping) -> Tensor:
        return F.grouped_mm(x_NI, factor_ERI.transpose(1, 2), offs=groups.ends_E)

    def outer(self, left_NR: Tensor, right_NI: Tensor, groups: Grouping) -> Tensor:
        out_ERI = F.grouped_mm(left_NR.t(), right_NI, offs=groups.ends_E)
        used_E = groups.ends_E > groups.starts_E
        return torch.where(used_E[:, None, None], out_ERI, 0)


def _with_side(out_NO: Tensor, side: Side | None, groups: Grouping) -> Tensor:
    if side is None:
        return out_NO
    added_NO = F.grouped_mm(side.hidden_NR, side.factor_EOR.transpose(1, 2), offs=groups.ends_E)
    if side.keep_NO is not None:
        added_NO = added_NO * side.keep_NO * side.scale
    return out_NO.add_(added_NO)
