"""What the kernels are given: one projection's weights of all experts, and their LoRA side path.

Shapes: E experts, I inputs, O outputs, R rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lola_ft.kernels.tiles import Tiles


@dataclass(frozen=True)
class NF4Stack:
    """All experts' 4-bit weights as they are stored, each expert quantised by itself, for kernels that read them.

    Attributes:
        packed: (E, I*O/2) uint8, two codes a byte, the first in the high bits.
        absmax: (E, I*O/64) uint8; `absmax2` (E, superblocks) and `offset` (E,) float32.
        absmax_code: (256,) and `nf4_code` (16,) float32.
        shape: (I, O).
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor
    offset: Tensor
    absmax_code: Tensor
    nf4_code: Tensor
    shape: tuple[int, int]


@dataclass(frozen=True)
class WeightStack:
    """One projection's weights of all experts.

    Attributes:
        trainable: The stack (E, in, out) if it wants a gradient, else None.
        tiles: Gives the dense weights (in, out) of some experts in a dtype, one after another, some rows at a time;
            outside autograd, called anew in backward.
        dense: Gives all experts' dense weights (E, in, out) in a dtype; outside autograd.
        rows: Inputs of the projection, `in`.
        nf4: The 4-bit form, if that is what is stored.
    """

    trainable: Tensor | None
    tiles: Callable[[list[int], torch.dtype], Iterator[Tiles]]
    dense: Callable[[torch.dtype], Tensor]
    rows: int
    nf4: NF4Stack | None = None


class Experts(Protocol):
    """What the kernels need of a module of experts, dense or 4-bit."""

    num_experts: int

    @property
    def up_proj_bias(self) -> Tensor: ...

    @property
    def down_proj_bias(self) -> Tensor: ...

    def weights(self, name: str) -> WeightStack: ...


@dataclass(frozen=True)
class LowRank:
    """A LoRA side path of all or some experts for one projection: `x @ a.T @ b.T`, scaling already in `b`.

    Attributes:
        a_ERI: (E, R, in).
        b_EOR: (E, out, R).
        dropout: Probability of dropping an input of the side path; 0 outside training.
        expert_ids: The experts that a and b are of, in order; None for all.
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
