"""The fused experts of one MoE layer, dense. Their 4-bit form is `lola_ft.quantization.experts`.

Shapes: T tokens, D hidden, F inner, E experts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lola_ft.kernels.experts import run_experts
from lola_ft.kernels.stacks import LowRank, WeightStack

PROJECTIONS = ("up_proj", "down_proj")


class LolaExperts(nn.Module):
    """E feed-forward networks `D -> F -> D` with biases, each token through the one that the router chose.

    Weights are (E, in, out), the orientation of the Hub's files: one expert's slice is one tensor on disk.
    """

    selected: tuple[int, ...] | None = None  # the experts that an adapter in the making gives LoRA; None for all
    is_transposed = True  # PEFT reads it: expert weights are (E, in, out), not (E, out, in)

    def __init__(self, hidden_size: int, inner_size: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.shapes = {"up_proj": (hidden_size, inner_size), "down_proj": (inner_size, hidden_size)}
        self._make_weights()
        self.up_proj_bias = nn.Parameter(torch.empty(num_experts, inner_size))
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, hidden_size))

    def _make_weights(self) -> None:
        for name, (in_features, out_features) in self.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(self.num_experts, in_features, out_features)))

    def weights(self, name: str) -> WeightStack:
        """`up_proj` or `down_proj` as the kernel wants it."""
        stack = getattr(self, name)
        dense = stack.detach()
        return WeightStack(
            stack if stack.requires_grad else None,
            lambda expert_ids, dtype: (iter([(0, dense[e].to(dtype))]) for e in expert_ids),
            dense.to,
            self.shapes[name][0],
        )

    def forward(
        self,
        x_TD: Tensor,
        expert_ids_T: Tensor,
        probs_T: Tensor,
        low_rank: Mapping[str, LowRank] | None = None,
    ) -> Tensor:
        """Send each token through its expert and scale by its probability.

        Args:
            low_rank: LoRA side paths for `up_proj` and `down_proj`, if any.

        Returns:
            (T, D) in x's dtype.
        """
        return run_experts(self, x_TD, expert_ids_T, probs_T, low_rank or {})

    def extra_repr(self) -> str:
        hidden_size, inner_size = self.shapes["up_proj"]
        return f"num_experts={self.num_experts}, hidden_size={hidden_size}, inner_size={inner_size}"
