"""LoRA on the router, whose scores are float32: on a linear layer, or on a router's bare weight."""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from torch import Tensor, nn

from lola_ft.adapters.expert_lora import without_extras


class RouterLora(LoraLinear):
    """PEFT's LoRA on a linear router, in float32 also under autocast, like the router itself."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float(), *args, **kwargs)


class ParamWrapper(StockParamWrapper):
    """LoRA on a router's bare weight: it scores with `W + BA`, in float32. PEFT requires this class name.

    The weight is small, (E, D). There is no side path, so dropout has no effect here.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ):
        kwargs.pop("is_target_conv_1d_layer", None)
        super().__init__(base_layer, adapter_name, parameter_name, without_extras(config), **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha, config=without_extras(config), **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return super().forward(x, *args, **kwargs)
        weight = self.get_param().float()
        with torch.autocast(x.device.type, enabled=False):
            for name in names:
                update = self.lora_B[name].weight.float() @ self.lora_A[name].weight.float()
                weight = weight + update * self.scaling[name]
        return torch.func.functional_call(self.get_base_layer(), {self.parameter_name: weight}, (x, *args), kwargs)
