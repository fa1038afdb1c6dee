"""The activations of experts, under the names of transformers' `ACT2FN`, each with its exact gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lola_ft.errors import UserError


@dataclass(frozen=True)
class Activation:
    """An elementwise function with its gradient.

    Attributes:
        forward: Returns the output for x, in x's shape and dtype.
        backward: Returns the gradient of x for the output's gradient and x.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def activation_of(name: str) -> Activation:
    """Return the activation of this name.

    Raises:
        UserError: If the kernels do not have it. The message lists the ones that they have.
    """
    if name not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise UserError(f"activation '{name}' of the experts is not supported; supported are {known}.")
    return ACTIVATIONS[name]


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda x: F.gelu(x, approximate=approximate),
        lambda d_out, x: torch.ops.aten.gelu_backward(d_out, x, approximate=approximate),
    )


_TANH_GELU, _EXACT_GELU = _gelu("tanh"), _gelu("none")
_SILU = Activation(F.silu, torch.ops.aten.silu_backward)
_RELU = Activation(F.relu, lambda d_out, x: torch.ops.aten.threshold_backward(d_out, x, 0))
_RELU_SQUARED = Activation(lambda x: F.relu(x).square(), lambda d_out, x: d_out * F.relu(x) * 2)

ACTIVATIONS = {
    "gelu": _EXACT_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_new": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "relu": _RELU,
    "relu2": _RELU_SQUARED,
    "silu": _SILU,
    "swish": _SILU,
}
