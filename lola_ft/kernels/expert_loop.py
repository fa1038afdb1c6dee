"""The experts' forward and backward one expert after another: gather, up, GELU, down, LoRA, probability, scatter.

Expert weights are asked for one tile at a time, in forward and again in backward, so that a 4-bit weight is dense
only while it is used. No gradient is formed for a weight, bias or adapter that does not want one. The way of the CPU,
and the reference of the ways that a GPU has (`device_experts.py`).

Shapes: T tokens, N rows of the grouped buffer, D hidden, F inner, E experts, R rank.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lola_ft.kernels.grouping import Grouping, group_by_expert
from lola_ft.kernels.stacks import Experts, LowRank
from lola_ft.kernels.tiles import Tiles, times, times_transposed


def run_loop(
    experts: Experts, x_TD: Tensor, expert_ids_T: Tensor, probs_T: Tensor, low_rank: Mapping[str, LowRank]
) -> Tensor:
    """Each token through its expert, scaled by its probability; all tensors in x's dtype."""
    dtype = x_TD.dtype
    factors: list[Tensor | None] = []
    dropouts: dict[str, float] = {}
    places: dict[str, list[int | None]] = {}
    for name in ("up_proj", "down_proj"):
        path = low_rank.get(name)
        factors += [path.a_ERI.to(dtype), path.b_EOR.to(dtype)] if path else [None, None]
        dropouts[name] = path.dropout if path else 0.0
        places[name] = path.place_of(experts.num_experts) if path else [None] * experts.num_experts
    up, down = experts.weights("up_proj"), experts.weights("down_proj")
    return _Experts.apply(
        x_TD,
        probs_T,
        up.trainable,
        experts.up_proj_bias,
        down.trainable,
        experts.down_proj_bias,
        *factors,
        up.tiles,
        down.tiles,
        group_by_expert(expert_ids_T, experts.num_experts),
        dropouts,
        places,
    )


class _Experts(torch.autograd.Function):
    """Saved for backward: grouped inputs, pre-activations, unscaled outputs, rank-R intermediates; no dense weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        probs_T: Tensor,
        up_weight: Tensor | None,
        up_bias_EF: Tensor,
        down_weight: Tensor | None,
        down_bias_ED: Tensor,
        a_up: Tensor | None,
        b_up: Tensor | None,
        a_down: Tensor | None,
        b_down: Tensor | None,
        up_of: Callable[[int, torch.dtype], Tiles],
        down_of: Callable[[int, torch.dtype], Tiles],
        groups: Grouping,
        dropouts: dict[str, float],
        places: dict[str, list[int | None]],
    ) -> Tensor:
        dtype = x_TD.dtype
        rows_ND = x_TD.new_zeros(groups.num_rows, x_TD.shape[1]).index_copy_(0, groups.row_of_token_T, x_TD)
        pre_NF = x_TD.new_empty(groups.num_rows, up_bias_EF.shape[1])
        y_ND = torch.empty_like(rows_ND)
        keep_ND = _dropout_mask(rows_ND, dropouts["up_proj"])
        keep_NF = _dropout_mask(pre_NF, dropouts["down_proj"])
        h_up = None if a_up is None else x_TD.new_empty(groups.num_rows, a_up.shape[1])
        h_down = None if a_down is None else x_TD.new_empty(groups.num_rows, a_down.shape[1])
        for e, i, j in groups.spans:
            x, pre, y = rows_ND[i:j], pre_NF[i:j], y_ND[i:j]
            times(x, up_of(e, dtype), pre)
            pre.add_(up_bias_EF[e])
            if (p := places["up_proj"][e]) is not None:
                _add_side(pre, _dropped(x, keep_ND, i, j), a_up, b_up, h_up, p, i, j)
            act = F.gelu(pre, approximate="tanh")
            times(act, down_of(e, dtype), y)
            y.add_(down_bias_ED[e])
            if (p := places["down_proj"][e]) is not None:
                _add_side(y, _dropped(act, keep_NF, i, j), a_down, b_down, h_down, p, i, j)
        y_TD = y_ND[groups.row_of_token_T]
        ctx.save_for_backward(
            rows_ND, pre_NF, y_TD, probs_T, a_up, b_up, a_down, b_down, h_up, h_down, keep_ND, keep_NF
        )
        ctx.up_of, ctx.down_of, ctx.groups, ctx.places = up_of, down_of, groups, places
        ctx.shapes = (up_weight, up_bias_EF, down_weight, down_bias_ED)
        return y_TD * probs_T[:, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD = grads[0]
        rows_ND, pre_NF, y_TD, probs_T, a_up, b_up, a_down, b_down, h_up, h_down, keep_ND, keep_NF = ctx.saved_tensors
        groups, up_of, down_of, places, dtype = ctx.groups, ctx.up_of, ctx.down_of, ctx.places, rows_ND.dtype
        wants = ctx.needs_input_grad
        d_up, d_up_bias, d_down, d_down_bias = (
            torch.zeros_like(tensor) if want else None for tensor, want in zip(ctx.shapes, wants[2:6], strict=True)
        )
        # Zeros, not empty: an expert without a token gets a zero gradient.
        d_factors = [
            torch.zeros_like(t) if t is not None and w else None
            for t, w in zip((a_up, b_up, a_down, b_down), wants[6:10], strict=True)
        ]
        d_a_up, d_b_up, d_a_down, d_b_down = d_factors
        d_probs_T = (grad_TD * y_TD).sum(-1, dtype=torch.float32).to(probs_T.dtype) if wants[1] else None
        d_y_ND = torch.zeros_like(rows_ND).index_copy_(0, groups.row_of_token_T, grad_TD * probs_T[:, None])
        d_x_ND = torch.empty_like(rows_ND) if wants[0] else None
        for e, i, j in groups.spans:
            x, pre, d_y = rows_ND[i:j], pre_NF[i:j], d_y_ND[i:j]
            act = F.gelu(pre, approximate="tanh")
            d_act = times_transposed(d_y, down_of(e, dtype), torch.empty_like(act))
            if d_down is not None:
                d_down[e] = act.t() @ d_y
            if d_down_bias is not None:
                d_down_bias[e] = d_y.sum(0)
            if (p := places["down_proj"][e]) is not None:
                side = _dropped(act, keep_NF, i, j)
                d_act += _side_backward(side, h_down[i:j], d_y, a_down, b_down, d_a_down, d_b_down, keep_NF, p, i, j)
            d_pre = torch.ops.aten.gelu_backward(d_act, pre, approximate="tanh")
            if d_up is not None:
                d_up[e] = x.t() @ d_pre
            if d_up_bias is not None:
                d_up_bias[e] = d_pre.sum(0)
            d_side = None
            if (p := places["up_proj"][e]) is not None:
                side = _dropped(x, keep_ND, i, j)
                d_side = _side_backward(side, h_up[i:j], d_pre, a_up, b_up, d_a_up, d_b_up, keep_ND, p, i, j)
            if d_x_ND is not None:
                times_transposed(d_pre, up_of(e, dtype), d_x_ND[i:j])
                if d_side is not None:
                    d_x_ND[i:j] += d_side
        d_x_TD = None if d_x_ND is None else d_x_ND[groups.row_of_token_T]
        return d_x_TD, d_probs_T, d_up, d_up_bias, d_down, d_down_bias, *d_factors, None, None, None, None, None


def _add_side(out: Tensor, side: Tensor, a: Any, b: Any, hidden: Any, place: int, i: int, j: int) -> None:
    """Add the side path at an expert's place to `out`, and keep its rank-R intermediate, rows i to j."""
    torch.mm(side, a[place].t(), out=hidden[i:j])
    out.addmm_(hidden[i:j], b[place].t())


def _side_backward(
    side: Tensor,
    hidden: Tensor,
    d_out: Tensor,
    a: Tensor,
    b: Tensor,
    d_a: Tensor | None,
    d_b: Tensor | None,
    keep: Tensor | None,
    place: int,
    i: int,
    j: int,
) -> Tensor:
    """Fill the adapter gradients at an expert's place; returns the gradient of the side path's input, rows i to j."""
    d_hidden = d_out @ b[place]
    if d_a is not None:
        torch.mm(d_hidden.t(), side, out=d_a[place])
    if d_b is not None:
        torch.mm(d_out.t(), hidden, out=d_b[place])
    return _dropped(d_hidden @ a[place], keep, i, j)


def _dropout_mask(like: Tensor, probability: float) -> Tensor | None:
    """0 where an entry is dropped and 1/(1-p) elsewhere, in `like`'s dtype; None without dropout."""
    return F.dropout(torch.ones_like(like), probability) if probability else None


def _dropped(x: Tensor, keep: Tensor | None, i: int, j: int) -> Tensor:
    return x if keep is None else x * keep[i:j]
