"""Every token through the expert that it was sent to: grouped, up, GELU, down, LoRA on the way, scaled, put back.

One forward and backward for all machines; what differs is how rows are grouped and multiplied (`Products`): one expert
after another on a CPU, all at once on a GPU.

Shapes: T tokens, N rows of the grouped buffer, D hidden, F inner, E experts, R rank.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lola_ft.kernels.choice import choose_products
from lola_ft.kernels.grouping import Grouping, fitting_tile_rows, group_by_expert, group_on_device
from lola_ft.kernels.loop_products import LoopProducts
from lola_ft.kernels.precision import compute_dtype
from lola_ft.kernels.products import Products, Side
from lola_ft.kernels.stacks import Experts, LowRank, WeightStack

RANK_MULTIPLE = 8
"""Ranks are padded to it: rows of a grouped product's operand start at multiples of 16 bytes."""


@torch.compiler.disable  # reads counts on the host, or launches kernels of its own: not for a compiler to trace
def run_experts(
    experts: Experts,
    x_TD: Tensor,
    expert_ids_T: Tensor,
    probs_T: Tensor,
    low_rank: Mapping[str, LowRank],
    products: Products | None = None,
) -> Tensor:
    """Send each token through its expert and scale by its probability; (T, D) in x's dtype.

    Args:
        products: How to multiply; by default what suits the device.
    """
    dtype = compute_dtype(x_TD)
    up, down = experts.weights("up_proj"), experts.weights("down_proj")
    if products is None and x_TD.device.type == "cpu":
        products = LoopProducts()
    if isinstance(products, LoopProducts):
        groups = group_by_expert(expert_ids_T, experts.num_experts)
    else:
        tile_rows = fitting_tile_rows(x_TD.shape[0], experts.num_experts)
        groups = group_on_device(expert_ids_T, experts.num_experts, tile_rows)
    factors: list[Tensor | None] = []
    for name in ("up_proj", "down_proj"):
        path = low_rank.get(name)
        factors += _padded(*path.of_all(experts.num_experts), dtype) if path else [None, None]
    with torch.autocast(x_TD.device.type, enabled=False):
        out_TD = _Experts.apply(
            x_TD.to(dtype),
            probs_T.to(dtype),
            up.trainable,
            experts.up_proj_bias,
            down.trainable,
            experts.down_proj_bias,
            *factors,
            up,
            down,
            groups,
            {name: path.dropout for name, path in low_rank.items()},
            products or choose_products(x_TD.to(dtype), up, down, groups),
        )
    return out_TD.to(x_TD.dtype)


class _Experts(torch.autograd.Function):
    """Saved for backward: grouped inputs, pre-activations, unscaled outputs, rank-R intermediates; no dense weight.

    Where a GPU computes GELU again, a CPU, for which that is a twentieth of the layer, keeps its output, too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        probs_T: Tensor,
        up_weight: Tensor | None,  # noqa: ARG004 (for its gradient)
        up_bias_EF: Tensor,
        down_weight: Tensor | None,  # noqa: ARG004
        down_bias_ED: Tensor,
        a_up: Tensor | None,
        b_up: Tensor | None,
        a_down: Tensor | None,
        b_down: Tensor | None,
        up: WeightStack,
        down: WeightStack,
        groups: Grouping,
        dropouts: dict[str, float],
        products: Products,
    ) -> Tensor:
        rows_ND = x_TD.new_zeros(groups.num_rows, x_TD.shape[1]).index_copy_(0, groups.row_of_token_T, x_TD)
        keep_ND = _keep(rows_ND, dropouts.get("up_proj", 0.0))
        h_up = None if a_up is None else products.to_rank(_dropped(rows_ND, keep_ND, dropouts, "up_proj"), a_up, groups)
        pre_NF = products.times(rows_ND, up, groups, up_bias_EF, _side(h_up, b_up))
        act_NF = F.gelu(pre_NF, approximate="tanh")
        keep_NF = _keep(act_NF, dropouts.get("down_proj", 0.0))
        h_down = (
            None
            if a_down is None
            else products.to_rank(_dropped(act_NF, keep_NF, dropouts, "down_proj"), a_down, groups)
        )
        y_TD = products.times(act_NF, down, groups, down_bias_ED, _side(h_down, b_down))[groups.row_of_token_T]
        ctx.save_for_backward(
            rows_ND,
            pre_NF,
            None if products.recomputes_activations else act_NF,
            y_TD,
            probs_T,
            *(a_up, b_up, a_down, b_down),
            *(h_up, h_down, keep_ND, keep_NF),
        )
        ctx.up, ctx.down, ctx.groups, ctx.dropouts, ctx.products = up, down, groups, dropouts, products
        ctx.biases = up_bias_EF, down_bias_ED
        return y_TD * probs_T[:, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD = grads[0]
        rows_ND, pre_NF, act_NF, y_TD, probs_T, *rest = ctx.saved_tensors
        a_up, b_up, a_down, b_down, h_up, h_down, keep_ND, keep_NF = rest
        groups, products, dropouts, wants = ctx.groups, ctx.products, ctx.dropouts, ctx.needs_input_grad
        d_probs_T = (grad_TD * y_TD).sum(-1, dtype=torch.float32).to(probs_T.dtype) if wants[1] else None
        d_y_ND = torch.zeros_like(rows_ND).index_copy_(0, groups.row_of_token_T, grad_TD * probs_T[:, None])
        if act_NF is None:
            act_NF = F.gelu(pre_NF, approximate="tanh")
        d_down = products.outer(act_NF, d_y_ND, groups) if wants[4] else None
        d_down_bias = _summed(d_y_ND, groups, ctx.biases[1]) if wants[5] else None
        dropped_NF, scale = _dropped(act_NF, keep_NF, dropouts, "down_proj"), _scale(dropouts, "down_proj")
        d_a_down, d_b_down, side = _side_backward(
            products, groups, d_y_ND, dropped_NF, h_down, a_down, b_down, wants[8:10], keep_NF, scale
        )
        d_act_NF = products.times_transposed(d_y_ND, ctx.down, groups, side)
        d_pre_NF = torch.ops.aten.gelu_backward(d_act_NF, pre_NF, approximate="tanh")
        d_up = products.outer(rows_ND, d_pre_NF, groups) if wants[2] else None
        d_up_bias = _summed(d_pre_NF, groups, ctx.biases[0]) if wants[3] else None
        dropped_ND, scale = _dropped(rows_ND, keep_ND, dropouts, "up_proj"), _scale(dropouts, "up_proj")
        d_a_up, d_b_up, side = _side_backward(
            products, groups, d_pre_NF, dropped_ND, h_up, a_up, b_up, wants[6:8], keep_ND, scale
        )
        d_x_TD = None
        if wants[0]:
            d_x_TD = products.times_transposed(d_pre_NF, ctx.up, groups, side)[groups.row_of_token_T]
        factors = (d_a_up, d_b_up, d_a_down, d_b_down)
        return d_x_TD, d_probs_T, d_up, d_up_bias, d_down, d_down_bias, *factors, *(None,) * 5


def _side_backward(
    products: Products,
    groups: Grouping,
    d_out_NO: Tensor,
    inputs_NI: Tensor,
    hidden_NR: Tensor | None,
    a_ERI: Tensor | None,
    b_EOR: Tensor | None,
    wants: tuple[bool, ...],
    keep_NI: Tensor | None,
    scale: float,
) -> tuple[Tensor | None, Tensor | None, Side | None]:
    """Gradients of a side path's A and B where they are wanted, and what it adds to that of its inputs.

    Args:
        inputs_NI: What went into the side path, after dropout. No factors, no side path.
    """
    if hidden_NR is None or a_ERI is None or b_EOR is None:
        return None, None, None
    d_hidden_NR = products.to_rank(d_out_NO, b_EOR.transpose(1, 2), groups)
    d_a = products.outer(d_hidden_NR, inputs_NI, groups) if wants[0] else None
    d_b = products.outer(hidden_NR, d_out_NO, groups).transpose(1, 2) if wants[1] else None
    return d_a, d_b, Side(d_hidden_NR, a_ERI.transpose(1, 2), keep_NI, scale)


def _padded(a_ERI: Tensor, b_EOR: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
    """Both factors contiguous, with zeros up to a rank that grouped products take."""
    missing = -a_ERI.shape[1] % RANK_MULTIPLE
    a, b = F.pad(a_ERI.to(dtype), (0, 0, 0, missing)), F.pad(b_EOR.to(dtype), (0, missing))
    return [a.contiguous(), b.contiguous()]


def _side(hidden: Tensor | None, factor: Tensor | None) -> Side | None:
    return None if hidden is None or factor is None else Side(hidden, factor)


def _summed(d_NO: Tensor, groups: Grouping, bias_EO: Tensor) -> Tensor:
    """Each expert's sum over its tokens' rows."""
    return torch.zeros_like(bias_EO).index_add_(0, groups.expert_ids_T, d_NO[groups.row_of_token_T].to(bias_EO.dtype))


def _keep(like: Tensor, probability: float) -> Tensor | None:
    """True where an entry is kept; None without dropout."""
    if not probability:
        return None
    return torch.empty(like.shape, dtype=torch.bool, device=like.device).bernoulli_(1 - probability)


def _scale(dropouts: Mapping[str, float], name: str) -> float:
    return 1 / (1 - dropouts.get(name, 0.0))


def _dropped(x: Tensor, keep: Tensor | None, dropouts: Mapping[str, float], name: str) -> Tensor:
    return x if keep is None else x * keep * _scale(dropouts, name)
