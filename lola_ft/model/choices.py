"""The experts that tokens are sent to, recorded at the input of the experts: in any family, with any router.

Shape suffixes: T tokens, K choices per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from lola_ft.model.experts import FusedExperts


class Choices(NamedTuple):
    """The choices of one MoE layer: ids (T, K) int64 of the experts, and the weights (T, K) of their outputs."""

    expert_ids_TK: Tensor
    weights_TK: Tensor


@contextmanager
def seen_choices(model: nn.Module) -> Iterator[list[Choices]]:
    """Collect the choices of every forward pass inside the block, layer by layer. The caller may clear the list."""
    seen: list[Choices] = []

    def see(_experts: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(Choices(args[1].detach(), args[2].detach()))

    handles = [m.register_forward_pre_hook(see) for m in model.modules() if isinstance(m, FusedExperts)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
