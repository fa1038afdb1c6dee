"""A check after the first backward pass that every trained tensor gets a gradient.

The best-known silent failure of expert LoRA is an adapter that is attached but never trained. An expert counts as used
if one of its tokens affects the loss. In the last layer, a token of a prompt does not.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lola_ft.adapters.expert_lora import ParamWrapper
from lola_ft.adapters.load_save import plain_name
from lola_ft.adapters.stacks import split_b
from lola_ft.model.experts import FusedExperts


class GradientCheck(TrainerCallback):
    """Records, during the first step, which experts get tokens with a gradient; then checks the adapter.

    Attributes:
        summary: The result as a sentence, after the first step; "" before.
    """

    def __init__(self, model: nn.Module) -> None:
        self.summary = ""
        self._model = model
        self._used: dict[str, set[int]] = defaultdict(set)
        self._handles = [
            module.register_forward_hook(self._watch(plain_name(name)))
            for name, module in model.named_modules()
            if isinstance(module, FusedExperts)
        ]

    def on_step_begin(self, *_: object, **__: object) -> None:
        if self._handles:
            self._used.clear()  # forget the trial of the longest batch, whose gradients were dropped

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        if self.summary:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.summary = check_gradients(self._model, self._used)

    def _watch(self, name: str) -> Callable[..., None]:
        def on_forward(module: nn.Module, inputs: tuple[Any, ...], out_TD: Tensor) -> None:  # noqa: ARG001
            if not out_TD.requires_grad:
                return
            expert_ids_TK = inputs[1]

            def on_gradient(d_out_TD: Tensor) -> None:
                live_T = d_out_TD.ne(0).any(dim=-1)
                self._used[name].update(expert_ids_TK[live_T].unique().tolist())

            out_TD.register_hook(on_gradient)

        return on_forward


def check_gradients(model: nn.Module, used: dict[str, set[int]]) -> str:
    """Check every trained tensor's gradient; of an expert, that of its `lora_B` (A's is zero while B is zero).

    Args:
        used: Ids of the experts that got a token with a gradient, by the fused module's name in the base.

    Raises:
        AssertionError: Tensors or experts have no gradient, which is a bug and not a user's mistake.
    """
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"{len(without)} trainable tensors got no gradient, such as {without[:3]}"
    idle: list[str] = []
    experts = 0
    for name, module in model.named_modules():
        if not isinstance(module, ParamWrapper):
            continue
        layer = plain_name(name)
        for adapter in module.active_adapters:
            experts_of = module.experts_of[adapter]
            grad_EOR = split_b(module.lora_B[adapter].weight.grad, len(experts_of))
            got = dict(zip(experts_of, grad_EOR.flatten(1).ne(0).any(dim=1).tolist(), strict=True))
            idle += [f"{layer} expert {e} {module.parameter_name}" for e in used.get(layer, ()) if not got.get(e, True)]
        experts += len(used.get(layer, ())) if module.parameter_name == "down_proj" else 0
    assert not idle, f"{len(idle)} expert adapters saw tokens and got no gradient, such as {idle[:3]}"
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    finite = all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad and p.grad is not None)
    note = "" if finite else " Some gradients are not finite."
    reached = f", {experts} experts were reached" if used else ""  # a dense model has none
    return f"First step: all {trainable} trainable tensors got a gradient{reached}.{note}"
