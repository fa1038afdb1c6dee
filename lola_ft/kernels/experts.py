"""Forward and backward of one layer's experts: group tokens by expert, project, activate, project back, sum.

The idea: copy the hidden states into a buffer in which each expert's rows are contiguous. Then every step is a product
of each group of rows with its expert's matrix. At the end each token collects its rows and sums them, weighted by the
router's probabilities. With T = 2 tokens, K = 2 choices per token and E = 3 experts:

    expert_ids_TK = [[2, 0], [0, 1]]            token 0 chose experts 2 and 0, token 1 chose experts 0 and 1
    rows_ND       = [x0, x1, x1, x0]            rows 0 and 1 belong to expert 0, row 2 to expert 1, row 3 to expert 2
    pre_NO        = rows @ W_up[expert of row]  and y_ND = act(pre) @ W_down[expert of row]
    out_TD[0]     = probs[0, 0] * y[3] + probs[0, 1] * y[0]
    out_TD[1]     = probs[1, 0] * y[1] + probs[1, 1] * y[2]

All families and devices share this code. Families differ in plain values: choices per token, gate or no gate, biases,
orientation of the weights. Devices differ in how rows are grouped and multiplied (`Products`): a CPU takes one expert
after another, a GPU takes all experts in one call.

Shape suffixes:
    T  tokens                       N  rows of the grouped buffer, N >= C (padding)
    K  choices (experts) per token  D  hidden size
    C  choices in all, C = T * K    F  inner size of an expert
    E  experts                      O  outputs of the projection into the experts: F, or 2F (gate, then up) with a gate
    R  LoRA rank                    I  inputs of a projection, in functions that serve both projections
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lola_ft.kernels.activations import Activation, activation_of
from lola_ft.kernels.choose_products import choose_products
from lola_ft.kernels.grouping import Grouping, fitting_tile_rows, group_by_expert, group_on_device
from lola_ft.kernels.loop_products import LoopProducts
from lola_ft.kernels.precision import compute_dtype
from lola_ft.kernels.products import Products, Side
from lola_ft.kernels.stacks import Experts, LowRank, WeightStack
from lola_ft.kernels.threads import in_blocks

RANK_MULTIPLE = 8
"""Ranks are padded to a multiple of this: rows of a grouped product's operand must start at multiples of 16 bytes."""


@torch.compiler.disable  # not traceable: it reads counts on the host (CPU) or launches Triton kernels (GPU)
def run_experts(
    experts: Experts,
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    probs_TK: Tensor,
    low_rank: Mapping[str, LowRank],
    products: Products | None = None,
) -> Tensor:
    """Send each token through its experts and sum their outputs, weighted by its router probabilities.

    Args:
        x_TD: Hidden states (T, D), any float dtype; computed in autocast's dtype where autocast is on.
        expert_ids_TK: The experts that each token chose (T, K), int64.
        probs_TK: The weight of each choice in the sum (T, K).
        low_rank: LoRA side paths by projection name.
        products: The way to multiply; by default chosen for the device.

    Returns:
        (T, D) in x's dtype.
    """
    assert expert_ids_TK.ndim == 2, f"choices are (T, K), not {tuple(expert_ids_TK.shape)}"
    dtype, expert_ids_C = compute_dtype(x_TD), expert_ids_TK.flatten()
    # Both projections in order (into the experts, back out), and the LoRA side path of each.
    up, down = (experts.weights(name) for name in experts.shapes)
    paths = [low_rank.get(name) for name in experts.shapes]
    # Plan the grouped buffer: a row for each of the C choices, sorted by expert.
    if products is None and x_TD.device.type == "cpu":
        products = LoopProducts()
    if isinstance(products, LoopProducts):
        groups = group_by_expert(expert_ids_C, experts.num_experts)
    else:
        tile_rows = fitting_tile_rows(expert_ids_C.numel(), experts.num_experts)
        groups = group_on_device(expert_ids_C, experts.num_experts, tile_rows)
    # LoRA factors of all experts, in order: A and B of up, A and B of down.
    factors: list[Tensor | None] = []
    for path in paths:
        factors += _padded(*path.of_all(experts.num_experts), dtype) if path else [None, None]
    up_dropout, down_dropout = (path.dropout if path else 0.0 for path in paths)
    products = products or choose_products(x_TD.to(dtype), up, down, groups)
    activation = activation_of(experts.activation)
    layer = _Layer(up, down, activation, experts.has_gate, groups, up_dropout, down_dropout, products)
    # Autocast is off inside: everything is already in `dtype`.
    with torch.autocast(x_TD.device.type, enabled=False):
        out_TD = _Experts.apply(
            x_TD.to(dtype), probs_TK.to(dtype), up.trainable, up.bias, down.trainable, down.bias, *factors, layer
        )
    return out_TD.to(x_TD.dtype)


@dataclass(frozen=True)
class _Layer:
    """Everything that forward and backward need besides the tensors that receive gradients."""

    up: WeightStack
    down: WeightStack
    activation: Activation
    has_gate: bool
    groups: Grouping
    up_dropout: float
    down_dropout: float
    products: Products

    def activated(self, pre_NO: Tensor) -> Tensor:
        """Return (N, F): `act(up)`, or `act(gate) * up` for gated experts."""
        if not self.has_gate:
            return self.activation.forward(pre_NO)
        gate_NF, up_NF = pre_NO.chunk(2, dim=1)
        act_NF = pre_NO.new_empty(gate_NF.shape)

        def fill(n: slice) -> None:
            torch.mul(self.activation.forward(gate_NF[n]), up_NF[n], out=act_NF[n])

        in_blocks(fill, pre_NO.shape[0], pre_NO.device)
        return act_NF

    def activated_backward(self, d_act_NF: Tensor, pre_NO: Tensor) -> Tensor:
        """Return the gradient of `pre_NO`, the input of `activated`; (N, O).

        For gated experts, act_NF = a(gate) * up gives d_gate = a'(gate) * d_act * up and d_up = d_act * a(gate).
        """
        if not self.has_gate:
            return self.activation.backward(d_act_NF, pre_NO)
        gate_NF, up_NF = pre_NO.chunk(2, dim=1)
        d_pre_NO = torch.empty_like(pre_NO)
        d_gate_NF, d_up_NF = d_pre_NO.chunk(2, dim=1)

        def fill(n: slice) -> None:
            d_gate_NF[n] = self.activation.backward(d_act_NF[n] * up_NF[n], gate_NF[n])
            torch.mul(d_act_NF[n], self.activation.forward(gate_NF[n]), out=d_up_NF[n])

        in_blocks(fill, pre_NO.shape[0], pre_NO.device)
        return d_pre_NO

    @property
    def keeps_activations(self) -> bool:
        """True if forward saves act (N, F) for backward, because computing it again would not be cheap.

        It is cheap on a GPU. For gated experts it is cheap everywhere: their backward computes act(gate) in any case.
        """
        return not (self.products.recomputes_activations or self.has_gate)


class _Experts(torch.autograd.Function):
    """The experts of one layer as a single autograd step.

    Saved for backward are inputs, pre-activations and the rank-R intermediates of LoRA: no dense weight and no output.
    With one choice per token the inputs are saved grouped, (N, D). With more choices that would be K copies, so they
    are saved as (T, D) and grouped again in backward. Activations are saved if `_Layer.keeps_activations`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        probs_TK: Tensor,
        up_weight: Tensor | None,  # noqa: ARG004 (for its gradient, like the next three)
        up_bias_EO: Tensor | None,  # noqa: ARG004
        down_weight: Tensor | None,  # noqa: ARG004
        down_bias_ED: Tensor | None,  # noqa: ARG004
        a_up_ERD: Tensor | None,
        b_up_EOR: Tensor | None,
        a_down_ERF: Tensor | None,
        b_down_EDR: Tensor | None,
        layer: _Layer,
    ) -> Tensor:
        groups, products, top_k = layer.groups, layer.products, probs_TK.shape[1]
        # In this function and in backward, W[e], A[e], B[e] and bias[e] are those of the row's expert, W[e] is written
        # as (in, out) however it is stored, and dropped(v) = v * keep / (1 - dropout) with one mask for both passes.
        # 1. Group: x (T, D) -> rows (N, D), one row per choice.
        rows_ND = _grouped(x_TD, groups, top_k)
        # 2. Into the experts. LoRA first goes down to its rank: hidden (N, R) = dropped(rows) @ A_up[e].T
        keep_ND = _keep(rows_ND, layer.up_dropout)
        hidden_up_NR = _to_rank(rows_ND, keep_ND, layer.up_dropout, a_up_ERD, layer)
        #    pre (N, O) = rows (N, D) @ W_up[e] (D, O) + bias_up[e] (O,) + hidden (N, R) @ B_up[e].T (R, O)
        pre_NO = products.times(rows_ND, layer.up, groups, _side(hidden_up_NR, b_up_EOR))
        # 3. Activate: act (N, F) = act(pre), or act(gate) * up with pre = [gate, up]
        act_NF = layer.activated(pre_NO)
        # 4. Out of the experts: hidden (N, R) = dropped(act) @ A_down[e].T
        keep_NF = _keep(act_NF, layer.down_dropout)
        hidden_down_NR = _to_rank(act_NF, keep_NF, layer.down_dropout, a_down_ERF, layer)
        #    y (N, D) = act (N, F) @ W_down[e] (F, D) + bias_down[e] (D,) + hidden (N, R) @ B_down[e].T (R, D)
        y_ND = products.times(act_NF, layer.down, groups, _side(hidden_down_NR, b_down_EDR))
        ctx.save_for_backward(
            rows_ND if top_k == 1 else x_TD,
            pre_NO,
            act_NF if layer.keeps_activations else None,
            probs_TK,
            *(a_up_ERD, b_up_EOR, a_down_ERF, b_down_EDR),
            *(hidden_up_NR, hidden_down_NR, keep_ND, keep_NF),
        )
        ctx.layer = layer
        # 5. Weight and sum: out[t] (D,) = sum over k of probs[t, k] * y[row of choice (t, k)]
        return _summed_over_choices(y_ND, groups, probs_TK, top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The steps of forward, last first. Step 5 is y times probs; its factor probs is applied late (5c), because the
        # gradient of probs needs the product of d_out and W_down before it is weighted.
        d_out_TD, layer = grads[0], ctx.layer
        inputs, pre_NO, act_NF, probs_TK, *rest = ctx.saved_tensors
        a_up_ERD, b_up_EOR, a_down_ERF, b_down_EDR, hidden_up_NR, hidden_down_NR, keep_ND, keep_NF = rest
        groups, products, top_k = layer.groups, layer.products, probs_TK.shape[1]
        wants_x, wants_probs, wants_up, wants_up_bias, wants_down, wants_down_bias, *wants_factors, _ = (
            ctx.needs_input_grad
        )
        # 5a. Group: d_out (T, D) -> (N, D), not weighted yet; and each row's weight, probs (N, 1), 0 in unused rows
        d_out_ND = _grouped(d_out_TD, groups, top_k)
        probs_N1 = F.pad(probs_TK.flatten(), (0, 1))[groups.choice_of_row()][:, None]
        # 4. Out of the experts: d_W_down[e] (F, D) = act.T @ (probs * d_out); d_bias_down[e] (D,) = sum(probs * d_out)
        if act_NF is None:
            act_NF = layer.activated(pre_NO)
        d_down = _weight_gradient(act_NF, d_out_ND * probs_N1, layer.down, layer) if wants_down else None
        d_down_bias = _bias_gradient(d_out_ND * probs_N1, layer.down, groups) if wants_down_bias else None
        d_a_down_ERF, d_b_down_EDR, side = _side_backward(
            d_out_ND,
            act_NF,
            keep_NF,
            layer.down_dropout,
            hidden_down_NR,
            a_down_ERF,
            b_down_EDR,
            wants_factors[2:],
            layer,
            probs_N1,
        )
        #    d_act (N, F) = d_out (N, D) @ W_down[e].T (D, F) + dropped((d_out @ B_down[e]) @ A_down[e]); weighted in 5c
        d_act_NF = products.times_transposed(d_out_ND, layer.down, groups, side)
        # 5b. d_probs[t, k] = d_out[t] . y[row], computed without y as d_act . act + d_out . bias_down[e]
        d_probs_TK = _weight_of_sum_gradient(d_out_TD, d_act_NF, act_NF, layer, probs_TK) if wants_probs else None
        # 5c. Weight: d_act (N, F) = probs (N, 1) * d_act
        d_act_NF *= probs_N1
        # 3. Activation: d_pre (N, O) = act'(pre) * d_act
        d_pre_NO = layer.activated_backward(d_act_NF, pre_NO)
        # 2. Into the experts: d_W_up[e] (D, O) = rows.T @ d_pre, d_bias_up[e] (O,) = sum(d_pre)
        rows_ND = inputs if top_k == 1 else _grouped(inputs, groups, top_k)
        d_up = _weight_gradient(rows_ND, d_pre_NO, layer.up, layer) if wants_up else None
        d_up_bias = _bias_gradient(d_pre_NO, layer.up, groups) if wants_up_bias else None
        d_a_up_ERD, d_b_up_EOR, side = _side_backward(
            d_pre_NO, rows_ND, keep_ND, layer.up_dropout, hidden_up_NR, a_up_ERD, b_up_EOR, wants_factors[:2], layer
        )
        #    d_rows (N, D) = d_pre (N, O) @ W_up[e].T (O, D) + dropped((d_pre @ B_up[e]) @ A_up[e])
        # 1. Back to tokens: d_x[t] (D,) = sum over k of d_rows[row of choice (t, k)]
        d_x_TD = None
        if wants_x:
            d_rows_ND = products.times_transposed(d_pre_NO, layer.up, groups, side)
            d_x_TD = _summed_over_choices(d_rows_ND, groups, None, top_k)
        factors = (d_a_up_ERD, d_b_up_EOR, d_a_down_ERF, d_b_down_EDR)
        return d_x_TD, d_probs_TK, d_up, d_up_bias, d_down, d_down_bias, *factors, None


def _grouped(x_TD: Tensor, groups: Grouping, top_k: int) -> Tensor:
    """Copy each token into the row of each of its choices; (N, D), zeros in unused rows."""
    # Choice c belongs to token c // K. Unused rows have choice C, so "token" T: the row of zeros appended here.
    return F.pad(x_TD, (0, 0, 0, 1))[groups.choice_of_row() // top_k]


def _summed_over_choices(y_ND: Tensor, groups: Grouping, probs_TK: Tensor | None, top_k: int) -> Tensor:
    """Sum each token's K rows, weighted if `probs_TK` is given; (T, D).

    The order of the sum is the order of the choices on every machine, so that the result does not depend on how rows
    were grouped. (A scatter-add on a GPU would sum in any order.)
    """
    rows_TK = groups.row_of_choice_C.view(-1, top_k)
    out_TD = y_ND.new_empty(rows_TK.shape[0], y_ND.shape[1])

    def fill(t: slice) -> None:
        y_TKD = y_ND[rows_TK[t]]
        if probs_TK is not None:
            y_TKD *= probs_TK[t, :, None]
        torch.sum(y_TKD, 1, out=out_TD[t])

    in_blocks(fill, out_TD.shape[0], out_TD.device)
    return out_TD


def _weight_of_sum_gradient(
    d_out_TD: Tensor, d_act_NF: Tensor, act_NF: Tensor, layer: _Layer, probs_TK: Tensor
) -> Tensor:
    """Return d_probs (T, K), the dot product of d_out and y, without y.

    With y = act @ W + bias and d_act = d_out @ W.T (not weighted), d_out . y = d_act . act + d_out . bias. A LoRA side
    path is part of W in both.
    """
    # d_act . act for each row, summed in float32
    dots_N = torch.empty(act_NF.shape[0], device=act_NF.device)

    def fill(n: slice) -> None:
        torch.sum(d_act_NF[n] * act_NF[n], -1, dtype=torch.float32, out=dots_N[n])

    in_blocks(fill, act_NF.shape[0], act_NF.device)
    d_probs_TK = dots_N[layer.groups.row_of_choice_C].view_as(probs_TK)
    # d_out (T, D) . bias of every expert -> (T, E), of which each choice takes its expert's
    if layer.down.bias is not None:
        of_all_TE = d_out_TD.float() @ layer.down.bias.detach().float().t()
        d_probs_TK += of_all_TE.gather(1, layer.groups.expert_ids_C.view_as(probs_TK))
    return d_probs_TK.to(probs_TK.dtype)


def _to_rank(
    x_NI: Tensor, keep_NI: Tensor | None, dropout: float, a_ERI: Tensor | None, layer: _Layer
) -> Tensor | None:
    """Return a side path's `dropped(x) @ A.T`, (N, R), or None if there is no side path."""
    return None if a_ERI is None else layer.products.to_rank(_dropped(x_NI, keep_NI, dropout), a_ERI, layer.groups)


def _side(hidden: Tensor | None, factor: Tensor | None) -> Side | None:
    return None if hidden is None or factor is None else Side(hidden, factor)


def _side_backward(
    d_out_NO: Tensor,
    x_NI: Tensor,
    keep_NI: Tensor | None,
    dropout: float,
    hidden_NR: Tensor | None,
    a_ERI: Tensor | None,
    b_EOR: Tensor | None,
    wants: list[bool],
    layer: _Layer,
    weight_N1: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Side | None]:
    """Backward of a side path: out = hidden @ B.T with hidden = dropped(x) @ A.T.

    Args:
        hidden_NR: As forward computed it.
        wants: Which of A and B want a gradient.
        weight_N1: A factor of each row of `d_out_NO` that the caller has not applied yet. The gradients of A and B
            include it. The path's share of the gradient of x does not: the caller applies it there.

    Returns:
        d_A (E, R, I) and d_B (E, O, R), None where not wanted, and the path's share of d_x (N, I) as a `Side`.
    """
    if hidden_NR is None or a_ERI is None or b_EOR is None:
        return None, None, None
    products, groups = layer.products, layer.groups
    # d_hidden (N, R) = d_out (N, O) @ B[e] (O, R)
    d_hidden_NR = products.to_rank(d_out_NO, b_EOR.transpose(1, 2), groups)
    # d_A[e] (R, I) = (weight * d_hidden).T (R, N) @ dropped(x) (N, I), over the rows of expert e
    weighted_NR = d_hidden_NR if weight_N1 is None else d_hidden_NR * weight_N1
    d_a_ERI = products.outer(weighted_NR, _dropped(x_NI, keep_NI, dropout), groups) if wants[0] else None
    # d_B[e] (O, R) = d_out.T (O, N) @ (weight * hidden) (N, R). The narrow factor is the one that is weighted.
    if weight_N1 is not None:
        hidden_NR = hidden_NR * weight_N1
    d_b_EOR = products.outer(hidden_NR, d_out_NO, groups).transpose(1, 2) if wants[1] else None
    # d_x gains dropped(d_hidden (N, R) @ A[e] (R, I)), which the caller's product with the weight adds
    return d_a_ERI, d_b_EOR, Side(d_hidden_NR, a_ERI.transpose(1, 2), keep_NI, 1 / (1 - dropout))


def _weight_gradient(x_NI: Tensor, d_out_NO: Tensor, weight: WeightStack, layer: _Layer) -> Tensor:
    """Return each expert's `x.T @ d_out` in its weight's orientation: (E, I, O) if transposed, else (E, O, I)."""
    left, right = (x_NI, d_out_NO) if weight.is_transposed else (d_out_NO, x_NI)
    return layer.products.outer(left, right, layer.groups)


def _bias_gradient(d_out_NO: Tensor, weight: WeightStack, groups: Grouping) -> Tensor:
    """Sum `d_out` over each expert's rows; (E, O)."""
    assert weight.bias is not None, "a projection without biases wants no gradient of them"
    d_out_CO = d_out_NO[groups.row_of_choice_C].to(weight.bias.dtype)
    return torch.zeros_like(weight.bias).index_add_(0, groups.expert_ids_C, d_out_CO)


def _padded(a_ERI: Tensor, b_EOR: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
    """Return both factors contiguous, in `dtype`, with zeros up to a multiple of `RANK_MULTIPLE`."""
    missing = -a_ERI.shape[1] % RANK_MULTIPLE
    a, b = F.pad(a_ERI.to(dtype), (0, 0, 0, missing)), F.pad(b_EOR.to(dtype), (0, missing))
    return [a.contiguous(), b.contiguous()]


def _keep(like: Tensor, probability: float) -> Tensor | None:
    """Draw a mask in `like`'s shape, True where an entry is kept; None without dropout."""
    if not probability:
        return None
    return torch.empty(like.shape, dtype=torch.bool, device=like.device).bernoulli_(1 - probability)


def _dropped(x: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    return x if keep is None else x * keep * (1 / (1 - dropout))
