"""LoRA on fused experts as a side path, inside PEFT.

PEFT's own wrapper for 3-D parameters (0.21) builds `W + BA` for all experts in every forward, needs the dense weight,
and refuses dropout. This subclass keeps its parameters, names and files, so that stock PEFT loads what we save, and
replaces the forward: each token pays rank-R work for its own expert only.

A (E*R, in) is expert-slowest, B (out, R*E) expert-fastest: PEFT's layout.
"""

import copy
from typing import Any, NoReturn

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from torch import Tensor, nn

from lola_ft.adapters.stacks import split_a, split_b
from lola_ft.errors import AdapterError
from lola_ft.kernels.experts import LowRank
from lola_ft.model.experts import LolaExperts
from lola_ft.quantization import NF4Experts


class ParamWrapper(StockParamWrapper):
    """LoRA of one projection of LolaExperts. (PEFT recognises these wrappers by this very class name.)

    Wrappers nest: `down_proj`'s holds `up_proj`'s, which holds the experts. The outermost one runs them all.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ):
        kwargs.pop("is_target_conv_1d_layer", None)
        self.dropout_of: dict[str, float] = {}
        super().__init__(base_layer, adapter_name, parameter_name, _without_dropout(config), **kwargs)
        self.dropout_of[adapter_name] = config.lora_dropout

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:  # noqa: ARG002
        experts = self.get_base_layer()
        self.num_experts = experts.num_experts
        self._param_ndim = 3
        return experts.shapes[self.parameter_name]

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha, config=_without_dropout(config), **kwargs)
        self.dropout_of[adapter_name] = config.lora_dropout

    def low_rank(self) -> LowRank | None:
        """The active adapters' side path; several act as one of their ranks' sum."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return None
        dropouts = {self.dropout_of[name] for name in names} if self.training else {0.0}
        if len(dropouts) > 1:
            raise AdapterError(f"adapters {', '.join(names)} have different dropout; train one at a time.")
        a = torch.cat([split_a(self.lora_A[name].weight, self.num_experts) for name in names], dim=1)
        b = torch.cat(
            [split_b(self.lora_B[name].weight, self.num_experts) * self.scaling[name] for name in names], dim=2
        )
        return LowRank(a, b, dropouts.pop())

    def forward(self, x_TD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check_forward_args(x_TD, *args, **kwargs)
        paths: dict[str, LowRank] = {}
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if layer.disable_adapters and layer.merged:
                layer.unmerge()
            path = layer.low_rank()
            if path is not None:
                paths[layer.parameter_name] = path
            layer = layer.base_layer
        return layer(x_TD, *args, low_rank=paths)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if isinstance(self.get_base_layer(), NF4Experts):
            refuse_merge()
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)


def _without_dropout(config: LoraConfig) -> LoraConfig:
    """A copy that stock PEFT's wrapper accepts; dropout happens in our side path."""
    plain = copy.copy(config)
    plain.lora_dropout = 0.0
    return plain


def refuse_merge() -> NoReturn:
    """PEFT's in-memory merge has nothing to add to here.

    Raises:
        AdapterError: Always, naming what merges instead.
    """
    raise AdapterError(
        "Merging into 4-bit weights in memory would round the adapter away. Use merge.py (lola_ft.merge): it merges "
        "into the original weights on disk."
    )


EXPERT_CLASSES = (LolaExperts, NF4Experts)
