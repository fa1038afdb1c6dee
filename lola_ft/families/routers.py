"""Changes to the routers of transformers' models: scores in the weight's dtype, and fixed choices when recomputed.

Shape suffixes: T tokens, K choices per token, D hidden.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class RouterInWeightDtype(nn.Module):
    """Mixin for a router: it scores in its weight's dtype, also under autocast.

    A trained weight is float32. In 16 bits, rounding could change the choice between two experts with close scores.
    """

    weight: Tensor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Score as the router does, for x (…, D) of any dtype."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype), *args, **kwargs)


def score_in_weight_dtype(router: nn.Module) -> None:
    """Turn a router of transformers into a `RouterInWeightDtype`; its class keeps its name."""
    own: Any = type(router)
    router.__class__ = _in_weight_dtype(own)


@cache
def _in_weight_dtype(router_class: Any) -> Any:
    return type(router_class.__name__, (RouterInWeightDtype, router_class), {"__module__": router_class.__module__})


def keeping_choices(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap torch's checkpoint function so that a recomputed layer repeats its top-k choices.

    Otherwise a rounding difference in the recomputation could send a token to another expert than in forward, and the
    gradient would belong to an output that the loss has not seen.
    """

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        choices = _Choices()

        def within(*inputs: Any, **named: Any) -> Any:
            with choices.again():
                return function(*inputs, **named)

        return checkpoint(within, *args, **kwargs)

    return run


class _Choices(TorchFunctionMode):
    """Records the indices of every `topk` of a layer in its first pass, and uses them in the next passes."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[Tensor] = []
        self._complete = False
        self._next = 0

    def again(self) -> "_Choices":
        """Begin a pass. The first one records."""
        self._complete, self._next = bool(self._made), 0
        return self

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in (torch.topk, torch.Tensor.topk):
            return function(*args, **kwargs)
        # First pass: record the choice. Later passes: ignore the scores and take the recorded one.
        if not self._complete:
            with torch.no_grad():
                self._made.append(function(*args, **kwargs).indices)
        indices = self._made[self._next]
        self._next += 1
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
        return torch.return_types.topk((_Taken.apply(args[0], dim, indices), indices))


class _Taken(torch.autograd.Function):
    """`scores.gather(dim, indices)`, which saves only the indices for backward, not the scores, in every pass."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, dim: int, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.dim, ctx.shape = dim, scores.shape
        return scores.gather(dim, indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).scatter_(ctx.dim, indices, grads[0]), None, None
