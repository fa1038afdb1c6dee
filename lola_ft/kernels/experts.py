"""Every token through the expert that it was sent to: the loop on a CPU, grouped products on a GPU.

Shapes: T tokens, D hidden.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lola_ft.kernels.device_experts import run_on_device
from lola_ft.kernels.expert_loop import run_loop
from lola_ft.kernels.precision import compute_dtype
from lola_ft.kernels.stacks import Experts, LowRank


@torch.compiler.disable  # reads counts on the host, or launches kernels of its own: not for a compiler to trace
def run_experts(
    experts: Experts,
    x_TD: Tensor,
    expert_ids_T: Tensor,
    probs_T: Tensor,
    low_rank: Mapping[str, LowRank],
) -> Tensor:
    """Send each token through its expert and scale by its probability; (T, D) in x's dtype."""
    dtype = compute_dtype(x_TD)
    run = run_loop if x_TD.device.type == "cpu" else run_on_device
    with torch.autocast(x_TD.device.type, enabled=False):
        out_TD = run(experts, x_TD.to(dtype), expert_ids_T, probs_T.to(dtype), low_rank)
    return out_TD.to(x_TD.dtype)
