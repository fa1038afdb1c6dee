"""Products of grouped rows with their experts' matrices: the interface, and a form with one call for all experts.

A grouped product takes rows x (N, I), sorted by expert, and matrices W (E, I, O). Row n gives `x[n] @ W[e]`, where e is
the expert whose group contains n: one matrix product per expert, of different heights.

Shape suffixes: N rows of the grouped buffer, E experts, I inputs and O outputs of the projection, R rank.
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
    """A LoRA side path's addition to a product's output: `hidden @ factor[expert].T`, zero where `keep` is False.

    Attributes:
        hidden_NR: (N, R).
        factor_EOR: (E, outputs, R), any strides.
        keep_NO: (N, outputs) bool; None without dropout.
        scale: Factor of the kept entries, 1 / (1 - dropout).
    """

    hidden_NR: Tensor
    factor_EOR: Tensor
    keep_NO: Tensor | None = None
    scale: float = 1.0


class Products(Protocol):
    """One way to multiply. Output rows beyond the last expert's group are undefined.

    Attributes:
        recomputes_activations: True if activations are cheap to compute, so that backward computes them again instead
            of saving them.
    """

    recomputes_activations: bool

    def times(self, x_NI: Tensor, weight: WeightStack, groups: Grouping, side: Side | None) -> Tensor:
        """Return `x @ weight[expert] + bias[expert]` plus the side path; (N, O)."""

    def times_transposed(self, x_NO: Tensor, weight: WeightStack, groups: Grouping, side: Side | None) -> Tensor:
        """Return `x @ weight[expert].T` plus the side path, without bias; (N, I)."""

    def to_rank(self, x_NI: Tensor, factor_ERI: Tensor, groups: Grouping) -> Tensor:
        """Return `x @ factor[expert].T`; (N, R)."""

    def outer(self, left_NR: Tensor, right_NI: Tensor, groups: Grouping) -> Tensor:
        """Return `left.T @ right` over each expert's rows; (E, R, I), zeros for an expert without tokens."""


class GroupedMatmuls:
    """torch's grouped matrix product on dense weights; 4-bit weights are dequantised for all experts at once.

    `F.grouped_mm(rows, matrices, offs)` multiplies rows up to offs[0] with matrix 0, rows up to offs[1] with matrix 1,
    and so on. With two 2-dimensional arguments the groups are along the dimension that is summed over (`outer`).
    """

    recomputes_activations = True

    def times(self, x_NI: Tensor, weight: WeightStack, groups: Grouping, side: Side | None) -> Tensor:
        # (N, I) @ (E, I, O) -> (N, O); a weight stored as (E, O, I) is read transposed
        dense = weight.dense(x_NI.dtype)
        out_NO = F.grouped_mm(x_NI, dense if weight.is_transposed else dense.transpose(1, 2), offs=groups.ends_E)
        if weight.bias is not None:
            out_NO += weight.bias.to(x_NI.dtype)[groups.expert_of_row()]
        return _with_side(out_NO, side, groups)

    def times_transposed(self, x_NO: Tensor, weight: WeightStack, groups: Grouping, side: Side | None) -> Tensor:
        # (N, O) @ (E, O, I) -> (N, I)
        dense = weight.dense(x_NO.dtype)
        out_NI = F.grouped_mm(x_NO, dense.transpose(1, 2) if weight.is_transposed else dense, offs=groups.ends_E)
        return _with_side(out_NI, side, groups)

    def to_rank(self, x_NI: Tensor, factor_ERI: Tensor, groups: Grouping) -> Tensor:
        # (N, I) @ (E, I, R) -> (N, R)
        return F.grouped_mm(x_NI, factor_ERI.transpose(1, 2), offs=groups.ends_E)

    def outer(self, left_NR: Tensor, right_NI: Tensor, groups: Grouping) -> Tensor:
        # (R, N) @ (N, I), cut along N -> (E, R, I); an empty group's matrix is not written, so it is set to 0
        out_ERI = F.grouped_mm(left_NR.t(), right_NI, offs=groups.ends_E)
        used_E = groups.ends_E > groups.starts_E
        return torch.where(used_E[:, None, None], out_ERI, 0)


def _with_side(out_NO: Tensor, side: Side | None, groups: Grouping) -> Tensor:
    """Add a LoRA side path, if any, to `out_NO` in place: (N, R) @ (E, R, O) -> (N, O)."""
    if side is None:
        return out_NO
    added_NO = F.grouped_mm(side.hidden_NR, side.factor_EOR.transpose(1, 2), offs=groups.ends_E)
    if side.keep_NO is not None:
        added_NO = added_NO * side.keep_NO * side.scale
    return out_NO.add_(added_NO)
