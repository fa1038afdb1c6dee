"""A linear layer whose weight is NF4, and dense only while it is multiplied with.

Forward dequantises the weight, multiplies and drops it; backward dequantises it again. With LoRA (A of rank R):

    y   (N, O) = x (N, I) @ W.T (I, O) + bias (O,) + hidden (N, R) @ B.T (R, O),   hidden = dropped(x) @ A.T (I, R)
    d_x (N, I) = d_y (N, O) @ W (O, I) + d_hidden (N, R) @ A (R, I),               d_hidden = d_y @ B (O, R)
    d_A (R, I) = d_hidden.T (R, N) @ dropped(x) (N, I),                            d_B (O, R) = d_y.T (O, N) @ hidden

With dropout, `dropped(x)` is an input of its own, and the term d_hidden @ A is its gradient instead of x's.

Shape suffixes: N rows (all dimensions of x but the last), I inputs, O outputs, R rank.
"""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from lola_ft.kernels.precision import compute_dtype
from lola_ft.kernels.tiles import Tiles, times, times_transposed
from lola_ft.quantization.nf4 import NF4, dequantize, dequantized_tiles, quant_state, quantize


class NF4Linear(bnb.nn.Linear4bit):
    """bitsandbytes' 4-bit linear layer (weight out×in) with the forward and backward of this file.

    The layer is of bitsandbytes' class, so that PEFT and other tools recognise it. The forward of that class (0.50) is
    not used: on CPUs with AVX512-BF16 it repacks the weight in place at the first evaluation, and afterwards training
    and dequantising are wrong.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias, quant_type="nf4", device="meta")
        self.support_avx512bf16_for_cpu = False

    def load_dense(self, weight: Tensor) -> None:
        """Quantise a dense weight (out, in) into this layer, on the weight's device."""
        self.load_quantized(quantize(weight))

    def load_quantized(self, nf4: NF4) -> None:
        """Use this quantised weight (out, in), without a copy."""
        state = quant_state(nf4, torch.Size((self.out_features, self.in_features)))
        self.weight = bnb.nn.Params4bit(
            nf4.packed.view(-1, 1),
            requires_grad=False,
            quant_state=state,
            quant_type="nf4",
            module=self,
            bnb_quantized=True,
        )
        self.quant_state = state

    def stored(self) -> NF4:
        """Return the quantised weight, as views."""
        state = self.weight.quant_state
        return NF4(self.weight.data.view(-1), state.absmax, state.state2.absmax, state.offset)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantised weight (out, in)."""
        state = self.weight.quant_state
        return dequantize(self.stored(), state.state2.code, tuple(state.shape), dtype)

    def tiles(self, dtype: torch.dtype) -> Tiles:
        """Yield the dequantised weight (out, in), some rows at a time."""
        state = self.weight.quant_state
        return dequantized_tiles(self.stored(), state.state2.code, tuple(state.shape), dtype)

    @torch.compiler.disable  # on a CPU, bitsandbytes 0.50's operator returns another shape than it declares
    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            return _NF4Linear.apply(x.to(dtype), self.bias, None, None, None, self)

    @torch.compiler.disable
    def forward_with_lora(self, x: Tensor, a_RI: Tensor, b_OR: Tensor, dropout: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `x W^T + bias + dropout(x) A^T B^T`, in one pass over the output.

        Args:
            b_OR: B times LoRA's scaling.
            dropout: Must return its argument itself if nothing is dropped.
        """
        dtype = compute_dtype(x)
        x = x.to(dtype)
        side = dropout(x)
        with torch.autocast(x.device.type, enabled=False):
            return _NF4Linear.apply(x, self.bias, None if side is x else side, a_RI.to(dtype), b_OR.to(dtype), self)


class _NF4Linear(torch.autograd.Function):
    """The layer as one autograd step that saves no dense weight: backward dequantises it again for the gradient of x.

    With LoRA it also saves the side path's input (N, I) and its rank-R intermediate (N, R). `side` is that input, or
    None if it is x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        side: Tensor | None,
        a_RI: Tensor | None,
        b_OR: Tensor | None,
        layer: NF4Linear,
    ) -> Tensor:
        ctx.layer = layer
        # y (N, O) = x (N, I) @ W.T (I, O) + bias (O,)
        rows = _rows(x)
        result = x.new_empty(*x.shape[:-1], layer.out_features)  # not a view, because models may change it in place
        out = result.view(-1, layer.out_features)
        times_transposed(rows, layer.tiles(x.dtype), out, None if bias is None else bias.to(x.dtype))
        if a_RI is not None and b_OR is not None:
            # hidden (N, R) = dropped(x) (N, I) @ A.T (I, R); y += hidden @ B.T (R, O)
            inputs = rows if side is None else _rows(side)
            hidden = inputs @ a_RI.t()
            out.addmm_(hidden, b_OR.t())
            ctx.save_for_backward(inputs, hidden, a_RI, b_OR)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_y, layer = grads[0], ctx.layer
        rows = _rows(d_y)
        wants_x, wants_bias, has_side, wants_a, wants_b, _ = ctx.needs_input_grad
        d_x = d_side = d_a = d_b = d_hidden = None
        # d_x (N, I) = d_y (N, O) @ W (O, I)
        if wants_x:
            d_x = times(rows, layer.tiles(d_y.dtype), rows.new_empty(rows.shape[0], layer.in_features))
        if saved := ctx.saved_tensors:  # read once: with activation recomputation they can be read only once
            inputs, hidden, a_RI, b_OR = saved
            # d_hidden (N, R) = d_y (N, O) @ B (O, R); d_A (R, I) = d_hidden.T @ dropped(x); d_B (O, R) = d_y.T @ hidden
            d_hidden = rows @ b_OR
            d_a = d_hidden.t() @ inputs if wants_a else None
            d_b = rows.t() @ hidden if wants_b else None
            # The path's share of the gradient, d_hidden (N, R) @ A (R, I), goes to its input: `side`, or x itself
            if has_side:
                d_side = (d_hidden @ a_RI).view(*d_y.shape[:-1], -1)
            elif d_x is not None:
                d_x.addmm_(d_hidden, a_RI)
        d_bias = rows.sum(0).to(layer.bias.dtype) if wants_bias else None
        return None if d_x is None else d_x.view(*d_y.shape[:-1], -1), d_bias, d_side, d_a, d_b, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
