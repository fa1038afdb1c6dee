"""The fused experts of one MoE layer, dense. Their 4-bit form is `lola_ft.quantization.experts`.

Shapes: T tokens, K choices of a token, D hidden, F inner, E experts.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lola_ft.kernels.activations import activation_of
from lola_ft.kernels.experts import run_experts
from lola_ft.kernels.stacks import LowRank, WeightStack


class FusedExperts(nn.Module):
    """E feed-forward networks `D -> F -> D`, each token through the ones that the router chose.

    Called like the experts modules of transformers, and able to take their place. Two projections are stacks of all
    experts' weights: `up_proj`, or `gate_up_proj` (gate, then up) where there is a gate; and `down_proj`. PEFT finds
    them by these names, in this order. A weight keeps the orientation of the family's files. (The defaults are LOLA's.)

    Args:
        has_gate: Whether an expert is `down(act(gate(x)) * up(x))`; else it is `down(act(up(x)))`.
        has_bias: Whether both projections have biases (`up_proj_bias`, …), one row per expert.
        is_transposed: Whether weights are (E, in, out); else they are (E, out, in). PEFT reads it, too.
        activation: Its name in transformers' `ACT2FN`; see `lola_ft.kernels.activations`.

    Raises:
        UserError: For an activation that the kernels do not have.

    Attributes:
        shapes: (in, out) of each projection, by name.
        parts: The tensors that a file holds for one expert, by name: the projection of each, and its number in that.
        selected: The experts that an adapter in the making gives LoRA; None for all.
    """

    selected: tuple[int, ...] | None = None

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        num_experts: int,
        *,
        has_gate: bool = False,
        has_bias: bool = True,
        is_transposed: bool = True,
        activation: str = "gelu_new",
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.inner_size = num_experts, hidden_size, inner_size
        self.has_gate, self.has_bias, self.is_transposed = has_gate, has_bias, is_transposed
        activation_of(activation)  # an unknown one is refused here, before weights are read
        self.activation = activation
        first, inputs = ("gate_up_proj", ("gate_proj", "up_proj")) if has_gate else ("up_proj", ("up_proj",))
        self.shapes = {first: (hidden_size, len(inputs) * inner_size), "down_proj": (inner_size, hidden_size)}
        self.parts = {name: (first, number) for number, name in enumerate(inputs)} | {"down_proj": ("down_proj", 0)}
        self._make_weights()
        for name, (_, out_features) in self.shapes.items():
            bias = nn.Parameter(torch.empty(num_experts, out_features)) if has_bias else None
            self.register_parameter(f"{name}_bias", bias)

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments: what another module of this layout is made with."""
        names = ("hidden_size", "inner_size", "num_experts", "has_gate", "has_bias", "is_transposed", "activation")
        return {name: getattr(self, name) for name in names}

    def part_shape(self, name: str) -> tuple[int, int]:
        """Shape of one expert's tensor, as stored, of a projection or of a part of one."""
        in_out = self.shapes.get(name, (self.hidden_size, self.inner_size))  # gate and up are parts of a projection
        return in_out if self.is_transposed else in_out[::-1]

    def _make_weights(self) -> None:
        for name in self.shapes:
            self.register_parameter(name, nn.Parameter(torch.empty(self.num_experts, *self.part_shape(name))))

    def load_expert(self, part: str, expert_id: int, weight: Tensor) -> None:
        """Copy one expert's weight, as a file holds it, into its place.

        Args:
            part: `up_proj`, `down_proj` or, of gated experts, `gate_proj`.
        """
        self._slot(part, expert_id).copy_(weight)

    def expert_weight(self, part: str, expert_id: int, dtype: torch.dtype) -> Tensor:
        """One expert's weight as a file holds it."""
        return self._slot(part, expert_id).to(dtype)

    def _slot(self, part: str, expert_id: int) -> Tensor:
        projection, number = self.parts[part]
        rows, columns = self.part_shape(part)
        stored = getattr(self, projection).detach()[expert_id]
        if self.is_transposed:
            return stored[:, number * columns : (number + 1) * columns]
        return stored[number * rows : (number + 1) * rows]

    def weights(self, name: str) -> WeightStack:
        """One projection as the kernel wants it."""
        stack = getattr(self, name)
        dense = stack.detach()
        return WeightStack(
            *self.shapes[name],
            self.is_transposed,
            stack if stack.requires_grad else None,
            getattr(self, f"{name}_bias"),
            lambda expert_ids, dtype: (iter([(0, dense[e].to(dtype))]) for e in expert_ids),
            dense.to,
        )

    def in_memory(self) -> AbstractContextManager[None]:
        """Return a context in which the weights can be computed with: always, unless they are elsewhere."""
        return nullcontext()

    def forward(
        self,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        probs_TK: Tensor,
        low_rank: Mapping[str, LowRank] | None = None,
    ) -> Tensor:
        """Send each token through its experts and sum their outputs, weighted by its probabilities.

        Args:
            low_rank: LoRA side paths by the projection's name, if any.

        Returns:
            (T, D) in x's dtype.
        """
        return run_experts(self, x_TD, expert_ids_TK, probs_TK, low_rank or {})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())
