"""The fused experts of one MoE layer, dense. Their 4-bit form is `lola_ft.quantization.experts`.

Where to read on: the module holds the weights; `lola_ft.kernels.experts` has forward and backward, step by step.

Shape suffixes: T tokens, K choices per token, D hidden, F inner, E experts.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lola_ft.kernels.activations import activation_of
from lola_ft.kernels.experts import run_experts
from lola_ft.kernels.stacks import LowRank, WeightStack


class FusedExperts(nn.Module):
    """E feed-forward networks `D -> F -> D`. Each token goes through the experts that the router chose.

    It is called like the experts modules of transformers and can replace them. Two projections are stacks of all
    experts' weights: `up_proj`, or `gate_up_proj` (gate, then up) for gated experts; and `down_proj`. PEFT finds them
    by these names, in this order. Weights keep the orientation of the family's files. The defaults are LOLA's.

    Args:
        hidden_size, inner_size: D and F.
        has_gate: True if an expert is `down(act(gate(x)) * up(x))`, False if it is `down(act(up(x)))`.
        has_bias: True if both projections have biases (`up_proj_bias`, …), one row per expert.
        is_transposed: True if weights are (E, in, out), False if they are (E, out, in). PEFT reads it, too.
        activation: The activation's name in transformers' `ACT2FN`; see `lola_ft.kernels.activations`.

    Raises:
        UserError: For an activation that the kernels do not have.

    Attributes:
        shapes: (in, out) of each projection, by name.
        parts: The tensors that a file holds for one expert, by name: each one's projection, and its number in it.
        selected: While an adapter is being made, the experts that get LoRA; None for all.
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
        activation_of(activation)  # refuses an unknown activation before weights are read
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
        """The constructor's arguments, to make another module of this layout."""
        names = ("hidden_size", "inner_size", "num_experts", "has_gate", "has_bias", "is_transposed", "activation")
        return {name: getattr(self, name) for name in names}

    def part_shape(self, name: str) -> tuple[int, int]:
        """Return the shape of one expert's tensor as stored, for a projection or a part of one (gate or up)."""
        in_out = self.shapes.get(name, (self.hidden_size, self.inner_size))  # gate and up are parts of a projection
        return in_out if self.is_transposed else in_out[::-1]

    def _make_weights(self) -> None:
        for name in self.shapes:
            self.register_parameter(name, nn.Parameter(torch.empty(self.num_experts, *self.part_shape(name))))

    def load_expert(self, part: str, expert_id: int, weight: Tensor) -> None:
        """Copy one expert's weight into its place.

        Args:
            part: `up_proj`, `down_proj` or, for gated experts, `gate_proj`.
            weight: In the shape and orientation of the family's files.
        """
        self._slot(part, expert_id).copy_(weight)

    def expert_weight(self, part: str, expert_id: int, dtype: torch.dtype) -> Tensor:
        """Return one expert's weight in the shape and orientation of the family's files."""
        return self._slot(part, expert_id).to(dtype)

    def _slot(self, part: str, expert_id: int) -> Tensor:
        """Return the view of the stack that holds one expert's part: all of its matrix, or gate's or up's half."""
        projection, number = self.parts[part]
        rows, columns = self.part_shape(part)
        stored = getattr(self, projection).detach()[expert_id]
        if self.is_transposed:
            return stored[:, number * columns : (number + 1) * columns]
        return stored[number * rows : (number + 1) * rows]

    def weights(self, name: str) -> WeightStack:
        """Return one projection's weights for the kernels."""
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

    def forward(
        self,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        probs_TK: Tensor,
        low_rank: Mapping[str, LowRank] | None = None,
    ) -> Tensor:
        """Send each token through its experts and sum their outputs, weighted by its probabilities.

        Args:
            x_TD: Hidden states (T, D), any float dtype.
            expert_ids_TK: The experts that each token chose (T, K), int64.
            probs_TK: The weight of each choice in the sum (T, K).
            low_rank: LoRA side paths by projection name, if any.

        Returns:
            (T, D) in x's dtype.
        """
        return run_experts(self, x_TD, expert_ids_TK, probs_TK, low_rank or {})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())
