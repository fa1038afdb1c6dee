"""LoRA+ (arXiv 2402.12354): LoRA's B learns faster than its A."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer


class LoraPlus(Trainer):
    """A trainer that gives B's factors groups of their own, with a higher learning rate."""

    def __init__(self, *args: Any, lora_plus_ratio: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora_plus_ratio = lora_plus_ratio

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh and self.lora_plus_ratio != 1:
            raise_rate_of_b(optimizer, self.model, self.lora_plus_ratio)
        return optimizer


def raise_rate_of_b(optimizer: torch.optim.Optimizer, model: nn.Module, ratio: float) -> None:
    """Move every LoRA B to a group with `ratio` times the learning rate of the one that it was in."""
    factors = {id(parameter) for name, parameter in model.named_parameters() if ".lora_B." in name}
    for group in list(optimizer.param_groups):
        chosen = [parameter for parameter in group["params"] if id(parameter) in factors]
        if chosen:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in factors]
            optimizer.add_param_group({**group, "params": chosen, "lr": group["lr"] * ratio})
