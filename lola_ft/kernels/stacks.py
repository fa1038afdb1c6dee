"""Inputs of the kernels: one projection's weights of all experts (dense or 4-bit), and their LoRA side path.

Weights keep the orientation in which a family's files store them: (in, out) or (out, in). A gated expert's gate and up
are one projection with the outputs of both side by side, gate first. In 4 bit they are two parts of that projection,
each quantised separately: with E = 2 gated experts there are P = 2 parts and M = 4 matrices, in the order gate of
expert 0, up of expert 0, gate of expert 1, up of expert 1.

Shape suffixes: E experts, P parts of a projection, M = E * P quantised matrices, I inputs, O outputs, R rank.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lola_ft.kernels.tiles import Tiles


@dataclass(frozen=True)
class NF4Stack:
    """All experts' 4-bit weights as stored, for kernels that read them directly.

    Each part of each expert is a matrix that was quantised separately. An expert's parts follow one another. A weight
    in block b of matrix m is `nf4_code[its 4-bit code] * scale`, where the block's scale is
    `absmax_code[absmax[m, b]] * absmax2[m, b // 256] + offset[m]`.

    Attributes:
        packed: 4-bit codes (M, n/2) uint8 for the n weights of a matrix; two per byte, the first in the high bits.
        absmax: 8-bit code of each block's scale (M, n/64), uint8.
        absmax2: Scale of each superblock of 256 scales (M, superblocks), float32.
        offset: Mean of a matrix's scales (M,), float32.
        absmax_code: Values of the 8-bit codes (256,), float32.
        nf4_code: Values of the 4-bit codes (16,), float32.
        shape: (rows, columns) of one matrix, as stored.
        parts: Matrices per expert (P).
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor
    offset: Tensor
    absmax_code: Tensor
    nf4_code: Tensor
    shape: tuple[int, int]
    parts: int


@dataclass(frozen=True)
class WeightStack:
    """One projection's weights of all experts, and their biases.

    Attributes:
        in_features, out_features: Sizes of the projection; gate and up count together.
        is_transposed: True if a weight is stored as (in, out), False if as (out, in).
        trainable: The stack (E, in, out) or (E, out, in), as stored, if it receives a gradient; else None.
        bias: (E, out), or None.
        tiles: Function of expert ids and a dtype that yields each expert's dense weight, as stored, some rows at a
            time. It runs outside autograd and is called again in backward.
        dense: Function of a dtype that returns all experts' dense weights (E, in, out) or (E, out, in), as stored,
            outside autograd.
        nf4: The 4-bit form, if the weights are stored in 4 bit; else None.
    """

    in_features: int
    out_features: int
    is_transposed: bool
    trainable: Tensor | None
    bias: Tensor | None
    tiles: Callable[[list[int], torch.dtype], Iterator[Tiles]]
    dense: Callable[[torch.dtype], Tensor]
    nf4: NF4Stack | None = None


class Experts(Protocol):
    """The interface of a module of experts, dense or 4-bit, that the kernels use.

    Attributes:
        has_gate: True if an expert is `down(act(gate(x)) * up(x))`, False if it is `down(act(up(x)))`.
        activation: Name of the activation in `lola_ft.kernels.activations`.
        shapes: (in, out) of the two projections by name: first the one into the experts, then the one back out.
    """

    num_experts: int
    has_gate: bool
    activation: str

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]: ...

    def weights(self, name: str) -> WeightStack:
        """Return one projection's weights, by the projection's name."""


@dataclass(frozen=True)
class LowRank:
    """A LoRA side path of all or some experts for one projection: `x @ a.T @ b.T`, with the scaling already in `b`.

    Attributes:
        a_ERI: (E, R, in), or fewer than E experts.
        b_EOR: (E, out, R), for the same experts. Gate and up share one pair, like their projection.
        dropout: Probability of dropping an input of the side path; 0 outside training.
        expert_ids: The experts that a and b belong to, in order; None for all.
    """

    a_ERI: Tensor
    b_EOR: Tensor
    dropout: float = 0.0
    expert_ids: tuple[int, ...] | None = None

    def of_all(self, num_experts: int) -> tuple[Tensor, Tensor]:
        """Return a (E, R, in) and b (E, out, R) of all experts, with zeros for experts that have no LoRA."""
        if self.expert_ids is None:
            return self.a_ERI, self.b_EOR
        places = torch.tensor(self.expert_ids, device=self.a_ERI.device)
        a = self.a_ERI.new_zeros(num_experts, *self.a_ERI.shape[1:]).index_copy(0, places, self.a_ERI)
        b = self.b_EOR.new_zeros(num_experts, *self.b_EOR.shape[1:]).index_copy(0, places, self.b_EOR)
        return a, b
