"""A linear layer whose weight is NF4, dense only while it is multiplied with."""

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from lola_ft.kernels.precision import compute_dtype
from lola_ft.kernels.tiles import Tiles, times, times_transposed
from lola_ft.quantization.nf4 import NF4, dequantize, dequantized_tiles, quant_state, quantize


class NF4Linear(bnb.nn.Linear4bit):
    """bitsandbytes' 4-bit linear layer (weight out×in) with a forward and backward of our own.

    Upstream's class holds the weight, so that PEFT and others recognise it. Its forward is not used, for on CPUs with
    AVX512-BF16 it repacks the weight in place at the first evaluation (0.50), after which training and dequantising
    are wrong.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=True, quant_type="nf4", device="meta")
        self.support_avx512bf16_for_cpu = False

    def load_dense(self, weight: Tensor) -> None:
        """Quantise a dense weight (out, in) into this layer, on the weight's device."""
        self.load_quantized(quantize(weight))

    def load_quantized(self, nf4: NF4) -> None:
        """Take over a quantised weight (out, in)."""
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
        """The quantised weight (views)."""
        state = self.weight.quant_state
        return NF4(self.weight.data.view(-1), state.absmax, state.state2.absmax, state.offset)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantised weight (out, in)."""
        state = self.weight.quant_state
        return dequantize(self.stored(), state.state2.code, tuple(state.shape), dtype)

    def tiles(self, dtype: torch.dtype) -> Tiles:
        """The dequantised weight (out, in), some rows at a time."""
        state = self.weight.quant_state
        return dequantized_tiles(self.stored(), state.state2.code, tuple(state.shape), dtype)

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            return _NF4Linear.apply(x.to(dtype), self.bias, self)


class _NF4Linear(torch.autograd.Function):
    """y = x W^T + b; keeps nothing but a reference to the layer, and dequantises again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(rows.shape[0], layer.out_features)
        return times_transposed(rows, layer.tiles(x.dtype), out, bias.to(x.dtype)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_y, layer = grads[0], ctx.layer
        rows = d_y.reshape(-1, d_y.shape[-1])
        wants_x, wants_bias, _ = ctx.needs_input_grad
        d_x = d_bias = None
        if wants_x:
            d_x = times(rows, layer.tiles(d_y.dtype), rows.new_empty(rows.shape[0], layer.in_features))
            d_x = d_x.view(*d_y.shape[:-1], -1)
        if wants_bias:
            d_bias = rows.sum(0).to(layer.bias.dtype)
        return d_x, d_bias, None


def is_quantizable(module: nn.Module) -> bool:
    """Whether a module is one of the linear layers that 4-bit loading replaces."""
    return type(module) is nn.Linear
