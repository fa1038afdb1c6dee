"""What the kernels are given: one projection's weights of all experts, and their LoRA side path.

Weights are used in the orientation in which a family's files store them: (in, out) or (out, in). A gated expert's gate
and up are one projection with the outputs of both side by side, gate first; in 4 bit they are two parts of it, each
quantised by itself.

Shapes: E experts, M = E*P quantised matrices for P parts of a projection, I inputs, O outputs, R rank.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lola_ft.kernels.tiles import Tiles


@dataclass(frozen=True)
class NF4Stack:
    """All experts' 4-bit weights as they are stored, for kernels that read them.

    Each part of each expert is a matrix that was quantised by itself; an expert's parts follow one another.

    Attributes:
        packed: (M, n/2) uint8 for the n weights of a matrix; two codes per byte, the first in the high bits.
        absmax: (M, n/64) uint8; `absmax2` (M, superblocks) and `offset` (M,) float32.
        absmax_code: (256,) and `nf4_code` (16,) float32.
        shape: Of one matrix, as stored.
        parts: Matrices per expert.
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
        in_features, out_features: Of the projection, gate and up together.
        is_transposed: Whether a weight is stored as (in, out); else as (out, in).
        trainable: The stack (E, in, out) or (E, out, in), as stored, if it wants a gradient, else None.
        bias: (E, out), or None.
        tiles: Gives the dense weights of some experts in a dtype, one after another, as stored and some rows at a
            time; outside autograd, called again in backward.
        dense: Gives all experts' dense weights in a dtype, as stored; outside autograd.
        nf4: The 4-bit form, if that is what is stored.
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
    """What the kernels need of a module of experts, dense or 4-bit.

    Attributes:
        has_gate: Whether an expert is `down(act(gate(x)) * up(x))`; else it is `down(act(up(x)))`.
        activation: Its name in `lola_ft.kernels.activations`.
        shapes: (in, out) of the two projections by name: the one into the experts first, the one back second.
    """

    num_experts: int
    has_gate: bool
    activation: str

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]: ...

    def weights(self, name: str) -> WeightStack:
        """One projection by its name."""

    def in_memory(self) -> AbstractContextManager[None]:
        """A context in which the weights are where they are computed with; entered forward and again backward."""


@dataclass(frozen=True)
class LowRank:
    """A LoRA side path of all or some experts for one projection: `x @ a.T @ b.T`, scaling already in `b`.

    Attributes:
        a_ERI: (E, R, in).
        b_EOR: (E, out, R); gate and up share a pair, like their projection.
        dropout: Probability of dropping an input of the side path; 0 outside training.
        expert_ids: The experts that a and b belong to, in order; None for all.
    """

    a_ERI: Tensor
    b_EOR: Tensor
    dropout: float = 0.0
    expert_ids: tuple[int, ...] | None = None

    def of_all(self, num_experts: int) -> tuple[Tensor, Tensor]:
        """a and b of all experts, zeros for those that have none."""
        if self.expert_ids is None:
            return self.a_ERI, self.b_EOR
        places = torch.tensor(self.expert_ids, device=self.a_ERI.device)
        a = self.a_ERI.new_zeros(num_experts, *self.a_ERI.shape[1:]).index_copy(0, places, self.a_ERI)
        b = self.b_EOR.new_zeros(num_experts, *self.b_EOR.shape[1:]).index_copy(0, places, self.b_EOR)
        return a, b
