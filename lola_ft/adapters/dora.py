"""DoRA on a linear layer, 4-bit or dense, without a dense weight in the graph (Liu et al. 2024, arXiv 2402.09353).

A weight's rows have lengths m, which are learned, and directions, which LoRA changes:

    y = m / |W + s B A| * (W + s B A) x + bias              with |.| the length of each row, (O,)
    |W_i + s B_i A|^2 = |W_i|^2 + 2 s B_i (W A^T)_i + s^2 B_i (A A^T) B_i^T     for row i

PEFT (0.21) builds `W + s B A` (O, I) in every forward and, with dropout, keeps W for backward. Here the base's output
is scaled, and the lengths come from the second line: W A^T (O, R) is one more pass of R rows through the weight, and
A A^T is (R, R). As in PEFT, lengths are constants for the gradient. Dropout acts only on the LoRA path.

Shape suffixes: I inputs, O outputs, R rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from lola_ft.kernels.tiles import times_transposed
from lola_ft.quantization import NF4Linear


class Magnitude(nn.Module):
    """The learned lengths (O,) of a weight's rows, and the lengths of the frozen weight's rows."""

    base_squares: Tensor

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        squares_O = _square_lengths(base_layer)
        self.weight = nn.Parameter(squares_O.sqrt())
        self.register_buffer("base_squares", squares_O, persistent=False)

    @torch.no_grad()
    def lengths(self, base_layer: nn.Linear, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
        """Return the lengths (O,) of the rows of `W + scaling * B A`, float32."""
        with torch.autocast(a_RI.device.type, enabled=False):
            # cross (O,) = B_i (W A^T)_i; own (O,) = B_i (A A^T) B_i^T, each for all rows i
            a_RI, b_OR = a_RI.float(), b_OR.float()
            cross_O = (_through_weight(a_RI, base_layer).t() * b_OR).sum(1)
            own_O = (b_OR @ (a_RI @ a_RI.t()) * b_OR).sum(1)
            return (self.base_squares + 2 * scaling * cross_O + scaling**2 * own_O).clamp(min=1e-20).sqrt()


class SideDora(DoraLinearVariant):
    """DoRA at PEFT's extension point for variants of LoRA. Names and files are PEFT's."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:  # noqa: ARG004
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        module.lora_magnitude_vector[adapter_name] = Magnitude(module.get_base_layer())

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # noqa: ARG004
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scaling, base_layer = module.scaling[active_adapter], module.get_base_layer()
        magnitude = module.lora_magnitude_vector[active_adapter]
        # y = factor * (W x + update) + bias, computed from result = W x + bias:
        # y = result + (factor - 1) * W x + factor * update
        factor_O = magnitude.weight / magnitude.lengths(base_layer, a.weight, b.weight, scaling)
        update = b(a(module.lora_dropout[active_adapter](x))) * scaling
        product = result if base_layer.bias is None else result - base_layer.bias
        scaled = (factor_O - 1) * product + factor_O * update
        return result + scaled.to(result.dtype)


class DenseLoraLinear(LoraLinear):
    """PEFT's LoRA on a dense linear layer, with the DoRA of this file."""

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        return SideDora() if config.use_dora else None


def _square_lengths(base_layer: nn.Linear) -> Tensor:
    if isinstance(base_layer, NF4Linear):
        return torch.cat([tile.square().sum(1) for _, tile in base_layer.tiles(torch.float32)])
    return base_layer.weight.detach().float().square().sum(1)


def _through_weight(x_RI: Tensor, base_layer: nn.Linear) -> Tensor:
    """Return `x W^T` (R, O) in float32."""
    if isinstance(base_layer, NF4Linear):
        out_RO = x_RI.new_empty(x_RI.shape[0], base_layer.out_features)
        return times_transposed(x_RI, base_layer.tiles(torch.float32), out_RO)
    return F.linear(x_RI, base_layer.weight.float())
