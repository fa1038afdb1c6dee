"""LoRA on fused experts as a side path, inside PEFT.

PEFT's own wrapper for 3-D parameters (0.21) builds `W + BA` for all experts in every forward, needs the dense weight,
and refuses dropout. This subclass keeps the wrapper's parameters, names and files, so that stock PEFT loads the saved
adapters. It replaces the forward: each token costs rank-R work for its own expert only.

In PEFT's layout, A (E*R, in) is expert-slowest and B (out, R*E) expert-fastest. With E = 2 and R = 2, the rows of A and
the columns of B belong to these (expert, rank) pairs:

    rows of A       (0, 0) (0, 1) (1, 0) (1, 1)
    columns of B    (0, 0) (1, 0) (0, 1) (1, 1)
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from torch import Tensor, nn

from lola_ft.adapters.selection import Selection, check_selection
from lola_ft.adapters.stacks import split_a, split_b
from lola_ft.errors import AdapterError
from lola_ft.kernels.stacks import LowRank
from lola_ft.model.experts import FusedExperts
from lola_ft.quantization import NF4Experts


class ParamWrapper(StockParamWrapper):
    """LoRA of one projection of FusedExperts. PEFT recognises its wrappers by this class name.

    Wrappers nest: the wrapper of `down_proj` holds the wrapper of `up_proj` or `gate_up_proj`, which holds the experts.
    The outermost wrapper runs the experts with all side paths.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ):
        kwargs.pop("is_target_conv_1d_layer", None)
        self.dropout_of: dict[str, float] = {}
        self.experts_of: dict[str, tuple[int, ...]] = {}
        super().__init__(base_layer, adapter_name, parameter_name, without_extras(config), **kwargs)
        self.dropout_of[adapter_name] = config.lora_dropout

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:  # noqa: ARG002
        experts = self.get_base_layer()
        self.num_experts = experts.num_experts
        self._param_ndim = 3
        return experts.part_shape(self.parameter_name)  # as stored; PEFT's `update_layer` swaps (out, in)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        experts = self.get_base_layer()
        self.experts_of[adapter_name] = experts.selected or tuple(range(experts.num_experts))
        self.num_experts = len(self.experts_of[adapter_name])  # PEFT makes this number of pairs
        super().update_layer(adapter_name, r, lora_alpha, config=without_extras(config), **kwargs)
        self.num_experts = experts.num_experts
        self.dropout_of[adapter_name] = config.lora_dropout

    def low_rank(self) -> LowRank | None:
        """Return the side path of the active adapters, or None. Several act as one, whose rank is the sum of theirs."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return None
        dropouts = {self.dropout_of[name] for name in names} if self.training else {0.0}
        if len(dropouts) > 1:
            raise AdapterError(f"adapters {', '.join(names)} have different dropout; train one at a time.")
        # All experts that any active adapter trains (E of them): a (E, sum of ranks, in), b (E, out, sum of ranks)
        experts = sorted({e for name in names for e in self.experts_of[name]})
        a = torch.cat([self._spread(split_a, self.lora_A, name, experts) for name in names], dim=1)
        b = torch.cat([self._spread(split_b, self.lora_B, name, experts) * self.scaling[name] for name in names], dim=2)
        return LowRank(a, b, dropouts.pop(), None if len(experts) == self.num_experts else tuple(experts))

    def _spread(self, split: Callable[[Tensor, int], Tensor], factors: Any, name: str, experts: list[int]) -> Tensor:
        """Return an adapter's factors of `experts`, with zeros for experts that it leaves out."""
        own = self.experts_of[name]
        stack = split(factors[name].weight, len(own))
        if len(own) == len(experts):
            return stack
        spread = stack.new_zeros(len(experts), *stack.shape[1:])
        places = torch.tensor([experts.index(e) for e in own], device=stack.device)
        return spread.index_copy(0, places, stack)

    def forward(self, x_TD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Walk inwards through the nested wrappers, collect each projection's side path, and call the experts once.
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


@contextmanager
def select_experts(model: nn.Module, config: LoraConfig, selection: Selection | None) -> Iterator[None]:
    """Tell each MoE layer which of its experts get LoRA, while an adapter is made inside the block.

    Args:
        config: Changed to name only the layers with selected experts.

    Raises:
        UserError: If the selection does not fit the model.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, FusedExperts)]
    if selection is None:
        yield
        return
    check_selection(selection, len(layers), layers[0][1].num_experts if layers else 0)
    chosen = [
        (name.replace(".base_layer", ""), module, ids) for (name, module), ids in zip(layers, selection, strict=True)
    ]
    named_in_full = any(target.count(".") > 1 for target in config.target_parameters or ())  # more than experts.up_proj
    if config.target_parameters and not all(selection) and not named_in_full:
        projections = [target.rpartition(".")[2] for target in config.target_parameters]
        prefix = "base_model.model."
        config.target_parameters = [
            f"{name.removeprefix(prefix)}.{projection}" for name, _, ids in chosen if ids for projection in projections
        ]
    try:
        for _, module, ids in chosen:
            module.selected = tuple(sorted(ids))
        yield
    finally:
        for _, module, _ in chosen:
            module.selected = None


def without_extras(config: LoraConfig) -> LoraConfig:
    """Return a copy of the config that PEFT's own wrapper accepts, without dropout and DoRA.

    Dropout happens in the side path of this file, and experts have no DoRA.
    """
    plain = copy.copy(config)
    plain.lora_dropout, plain.use_dora = 0.0, False
    return plain


def refuse_merge() -> NoReturn:
    """Refuse PEFT's merge in memory, because fused experts have no single dense weight to add to.

    Raises:
        AdapterError: Always. The message names the command that merges.
    """
    raise AdapterError(
        "Merging into 4-bit weights in memory would round the adapter away. Use `lola-ft merge` (lola_ft.merge): it "
        "merges into the original weights on disk."
    )


EXPERT_CLASSES = (FusedExperts, NF4Experts)
