"""Every token through the experts that it chose: grouped, in, activation, out, LoRA beside, weighted, summed.

One forward and backward for all families and machines. What differs between families is plain values: how many experts
a token chooses, gated or not, biases or none, the weights' orientation. What differs between machines is how rows are
grouped and multiplied (`Products`): one expert after another on a CPU, all at once on a GPU.

Shapes: T tokens, K choices of a token, C = T*K choices, N rows of the grouped buffer, D hidden, F inner, E experts,
R rank; O outputs of the projection into the experts: F, or 2F (gate, then up) for gated ones.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
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
"""Ranks are padded to it: rows of a grouped product's operand start at multiples of 16 bytes."""


@torch.compiler.disable  # reads counts on the host, or launches kernels of its own: not for a compiler to trace
def run_experts(
    experts: Experts,
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    probs_TK: Tensor,
    low_rank: Mapping[str, LowRank],
    products: Products | None = None,
) -> Tensor:
    """Send each token through its experts and sum their outputs weighted by its probabilities; (T, D) in x's dtype.

    Args:
        low_rank: LoRA side paths by the projection's name.
        products: How to multiply; by default what suits the device.
    """
    assert expert_ids_TK.ndim == 2, f"choices are (T, K), not {tuple(expert_ids_TK.shape)}"
    dtype, expert_ids_C = compute_dtype(x_TD), expert_ids_TK.flatten()
    up, down = (experts.weights(name) for name in experts.shapes)
    paths = [low_rank.get(name) for name in experts.shapes]
    if products is None and x_TD.device.type == "cpu":
        products = LoopProducts()
    if isinstance(products, LoopProducts):
        groups = group_by_expert(expert_ids_C, experts.num_experts)
    else:
        tile_rows = fitting_tile_rows(expert_ids_C.numel(), experts.num_experts)
        groups = group_on_device(expert_ids_C, experts.num_experts, tile_rows)
    factors: list[Tensor | None] = []
    for path in paths:
        factors += _padded(*path.of_all(experts.num_experts), dtype) if path else [None, None]
    up_dropout, down_dropout = (path.dropout if path else 0.0 for path in paths)
    activation = activation_of(experts.activation)
    with torch.autocast(x_TD.device.type, enabled=False), experts.in_memory():
        products = products or choose_products(x_TD.to(dtype), up, down, groups)
        dropouts = up_dropout, down_dropout
        layer = _Layer(up, down, activation, experts.has_gate, groups, *dropouts, products, experts.in_memory)
        out_TD = _Experts.apply(
            x_TD.to(dtype), probs_TK.to(dtype), up.trainable, up.bias, down.trainable, down.bias, *factors, layer
        )
    return out_TD.to(x_TD.dtype)


@dataclass(frozen=True)
class _Layer:
    """What a pass needs beside the tensors that gradients flow to."""

    up: WeightStack
    down: WeightStack
    activation: Activation
    has_gate: bool
    groups: Grouping
    up_dropout: float
    down_dropout: float
    products: Products
    in_memory: Callable[[], AbstractContextManager[None]]

    def activated(self, pre_NO: Tensor) -> Tensor:
        """(N, F): `act(up)`, or `act(gate) * up` of gated experts."""
        if not self.has_gate:
            return self.activation.forward(pre_NO)
        gate_NF, up_NF = pre_NO.chunk(2, dim=1)
        act_NF = pre_NO.new_empty(gate_NF.shape)

        def fill(n: slice) -> None:
            torch.mul(self.activation.forward(gate_NF[n]), up_NF[n], out=act_NF[n])

        in_blocks(fill, pre_NO.shape[0], pre_NO.device)
        return act_NF

    def activated_backward(self, d_act_NF: Tensor, pre_NO: Tensor) -> Tensor:
        """(N, O): the gradient of what `activated` was given."""
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
        """Whether backward is given act (N, F): where computing it again is not cheap.

        It is cheap on a GPU, and for gated experts everywhere: their backward needs act(gate) in any case.
        """
        return not (self.products.recomputes_activations or self.has_gate)


class _Experts(torch.autograd.Function):
    """Saved for backward: inputs, pre-activations, rank-R intermediates; no dense weight and no output.

    Inputs are saved grouped, (N, D), where a token has one choice. With more choices they are saved as they came,
    (T, D), and grouped again. Activations are saved where `_Layer.keeps_activations`.
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
        a_up: Tensor | None,
        b_up: Tensor | None,
        a_down: Tensor | None,
        b_down: Tensor | None,
        layer: _Layer,
    ) -> Tensor:
        groups, products, top_k = layer.groups, layer.products, probs_TK.shape[1]
        # Group: x (T, D) -> rows (N, D), a row for each choice.
        rows_ND = _grouped(x_TD, groups, top_k)
        # Into the experts: pre (N, O) = rows @ W_up + bias + dropped(rows) @ A_up.T @ B_up.T
        keep_ND = _keep(rows_ND, layer.up_dropout)
        h_up = _to_rank(rows_ND, keep_ND, layer.up_dropout, a_up, layer)
        pre_NO = products.times(rows_ND, layer.up, groups, _side(h_up, b_up))
        # Activation: act (N, F)
        act_NF = layer.activated(pre_NO)
        # Out of them: y (N, D) = act @ W_down + bias + dropped(act) @ A_down.T @ B_down.T
        keep_NF = _keep(act_NF, layer.down_dropout)
        h_down = _to_rank(act_NF, keep_NF, layer.down_dropout, a_down, layer)
        y_ND = products.times(act_NF, layer.down, groups, _side(h_down, b_down))
        ctx.save_for_backward(
            rows_ND if top_k == 1 else x_TD,
            pre_NO,
            act_NF if layer.keeps_activations else None,
            probs_TK,
            *(a_up, b_up, a_down, b_down),
            *(h_up, h_down, keep_ND, keep_NF),
        )
        ctx.layer = layer
        # Weigh and sum: out (T, D) = sum over k of probs (T, K) * y (T, K, D)
        return _summed_over_choices(y_ND, groups, probs_TK, top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # first: with gradient checkpointing this computes the layer again
        with ctx.layer.in_memory():
            return _Experts._gradients(ctx, grads[0], saved)

    @staticmethod
    def _gradients(ctx: Any, d_out_TD: Tensor, saved: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        layer = ctx.layer
        inputs, pre_NO, act_NF, probs_TK, *rest = saved
        a_up, b_up, a_down, b_down, h_up, h_down, keep_ND, keep_NF = rest
        groups, products, top_k = layer.groups, layer.products, probs_TK.shape[1]
        wants_x, wants_probs, wants_up, wants_up_bias, wants_down, wants_down_bias, *wants_factors, _ = (
            ctx.needs_input_grad
        )
        # Group: d_out (N, D), not weighted yet, and the weight of each row, probs (N, 1), zero between groups
        d_out_ND = _grouped(d_out_TD, groups, top_k)
        probs_N1 = F.pad(probs_TK.flatten(), (0, 1))[groups.choice_of_row()][:, None]
        # Out of the experts: d_W_down = act.T @ (probs * d_out); and before it is weighted,
        # d_act (N, F) = d_out @ W_down.T + kept((d_out @ B_down) @ A_down)
        if act_NF is None:
            act_NF = layer.activated(pre_NO)
        d_down = _weight_gradient(act_NF, d_out_ND * probs_N1, layer.down, layer) if wants_down else None
        d_down_bias = _bias_gradient(d_out_ND * probs_N1, layer.down, groups) if wants_down_bias else None
        d_a_down, d_b_down, side = _side_backward(
            d_out_ND, act_NF, keep_NF, layer.down_dropout, h_down, a_down, b_down, wants_factors[2:], layer, probs_N1
        )
        d_act_NF = products.times_transposed(d_out_ND, layer.down, groups, side)
        # Weights of the sum: d_probs (T, K) = d_out . y = d_act . act + d_out . bias, without y; then weigh d_act
        d_probs_TK = _weight_of_sum_gradient(d_out_TD, d_act_NF, act_NF, layer, probs_TK) if wants_probs else None
        d_act_NF *= probs_N1
        # Activation: d_pre (N, O)
        d_pre_NO = layer.activated_backward(d_act_NF, pre_NO)
        # Into the experts: d_W_up = rows.T @ d_pre; d_rows (N, D) = d_pre @ W_up.T + kept((d_pre @ B_up) @ A_up)
        rows_ND = inputs if top_k == 1 else _grouped(inputs, groups, top_k)
        d_up = _weight_gradient(rows_ND, d_pre_NO, layer.up, layer) if wants_up else None
        d_up_bias = _bias_gradient(d_pre_NO, layer.up, groups) if wants_up_bias else None
        d_a_up, d_b_up, side = _side_backward(
            d_pre_NO, rows_ND, keep_ND, layer.up_dropout, h_up, a_up, b_up, wants_factors[:2], layer
        )
        # Back to tokens: d_x (T, D) = sum over k of d_rows
        d_x_TD = None
        if wants_x:
            d_rows_ND = products.times_transposed(d_pre_NO, layer.up, groups, side)
            d_x_TD = _summed_over_choices(d_rows_ND, groups, None, top_k)
        factors = (d_a_up, d_b_up, d_a_down, d_b_down)
        return d_x_TD, d_probs_TK, d_up, d_up_bias, d_down, d_down_bias, *factors, None


def _grouped(x_TD: Tensor, groups: Grouping, top_k: int) -> Tensor:
    """(N, D): each token in the row of each of its choices, zeros in the rows between."""
    return F.pad(x_TD, (0, 0, 0, 1))[groups.choice_of_row() // top_k]


def _summed_over_choices(y_ND: Tensor, groups: Grouping, probs_TK: Tensor | None, top_k: int) -> Tensor:
    """(T, D): each token's rows, weighted where weights are given, in the order of its choices on every machine."""
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
    """(T, K): d_out . y, where y = act @ W + bias and d_act = d_out @ W.T, so that y itself is not needed."""
    dots_N = torch.empty(act_NF.shape[0], device=act_NF.device)

    def fill(n: slice) -> None:
        torch.sum(d_act_NF[n] * act_NF[n], -1, dtype=torch.float32, out=dots_N[n])

    in_blocks(fill, act_NF.shape[0], act_NF.device)
    d_probs_TK = dots_N[layer.groups.row_of_choice_C].view_as(probs_TK)
    if layer.down.bias is not None:
        of_all_TE = d_out_TD.float() @ layer.down.bias.detach().float().t()
        d_probs_TK += of_all_TE.gather(1, layer.groups.expert_ids_C.view_as(probs_TK))
    return d_probs_TK.to(probs_TK.dtype)


def _to_rank(
    x_NI: Tensor, keep_NI: Tensor | None, dropout: float, a_ERI: Tensor | None, layer: _Layer
) -> Tensor | None:
    """(N, R): `dropped(x) @ A.T` of a side path; None if there is no side path."""
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
    """Gradients of a side path's A and B where they are wanted, and what the path adds to the gradient of x.

    Args:
        weight_N1: What `d_out` is yet to be multiplied by, and the gradient of x, too.
    """
    if hidden_NR is None or a_ERI is None or b_EOR is None:
        return None, None, None
    products, groups = layer.products, layer.groups
    # d_hidden (N, R) = d_out @ B; d_A = d_hidden.T @ dropped(x); d_B = d_out.T @ hidden
    d_hidden_NR = products.to_rank(d_out_NO, b_EOR.transpose(1, 2), groups)
    weighted_NR = d_hidden_NR if weight_N1 is None else d_hidden_NR * weight_N1
    d_a = products.outer(weighted_NR, _dropped(x_NI, keep_NI, dropout), groups) if wants[0] else None
    if weight_N1 is not None:
        hidden_NR = hidden_NR * weight_N1
    d_b = products.outer(hidden_NR, d_out_NO, groups).transpose(1, 2) if wants[1] else None
    return d_a, d_b, Side(d_hidden_NR, a_ERI.transpose(1, 2), keep_NI, 1 / (1 - dropout))


def _weight_gradient(x_NI: Tensor, d_out_NO: Tensor, weight: WeightStack, layer: _Layer) -> Tensor:
    """Each expert's `x.T @ d_out`, in the orientation that its weight has."""
    left, right = (x_NI, d_out_NO) if weight.is_transposed else (d_out_NO, x_NI)
    return layer.products.outer(left, right, layer.groups)


def _bias_gradient(d_out_NO: Tensor, weight: WeightStack, groups: Grouping) -> Tensor:
    """(E, O): each expert's sum over its rows."""
    assert weight.bias is not None, "a projection without biases wants no gradient of them"
    d_out_CO = d_out_NO[groups.row_of_choice_C].to(weight.bias.dtype)
    return torch.zeros_like(weight.bias).index_add_(0, groups.expert_ids_C, d_out_CO)


def _padded(a_ERI: Tensor, b_EOR: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
    """Both factors contiguous, with zeros up to a rank that grouped products take."""
    missing = -a_ERI.shape[1] % RANK_MULTIPLE
    a, b = F.pad(a_ERI.to(dtype), (0, 0, 0, missing)), F.pad(b_EOR.to(dtype), (0, missing))
    return [a.contiguous(), b.contiguous()]


def _keep(like: Tensor, probability: float) -> Tensor | None:
    """True where an entry is kept; None without dropout."""
    if not probability:
        return None
    return torch.empty(like.shape, dtype=torch.bool, device=like.device).bernoulli_(1 - probability)


def _dropped(x: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    return x if keep is None else x * keep * (1 / (1 - dropout))
