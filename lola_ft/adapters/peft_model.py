"""An adapter attached to a model: PEFT's wrappers around the modules that get LoRA, everything else frozen."""

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import transformers_weight_conversion
from torch import Tensor, nn
from transformers import PreTrainedModel

from lola_ft.adapters.dora import DenseLoraLinear, SideDora
from lola_ft.adapters.expert_lora import EXPERT_CLASSES, ParamWrapper, refuse_merge, select_experts
from lola_ft.adapters.router_lora import ParamWrapper as RouterParamWrapper
from lola_ft.adapters.router_lora import RouterLora
from lola_ft.adapters.selection import Selection
from lola_ft.adapters.settings import AdapterSettings, lora_config
from lola_ft.adapters.token_rows import compute_by_row
from lola_ft.adapters.trained_bias import bias_names, drop_copied_biases, seen_by_peft, train_biases
from lola_ft.checkpoints.fingerprint import fingerprint_in_memory
from lola_ft.errors import UserError
from lola_ft.families import architecture_of
from lola_ft.families.routers import RouterInWeightDtype
from lola_ft.model.router import RouterGate
from lola_ft.quantization import NF4Linear


class NF4LoraLinear(LoraLinear4bit):
    """PEFT's LoRA on a 4-bit linear layer.

    A single plain adapter is added inside the layer's own forward, because PEFT's forward creates four more tensors of
    the output's size. Merging in memory is refused, because it would quantise the merged weight again.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        plain = not (args or kwargs or self.disable_adapters or self.merged)
        if len(names) != 1 or names[0] in self.lora_variant or not plain:
            return super().forward(x, *args, **kwargs)
        (name,) = names
        b_OR = self.lora_B[name].weight * self.scaling[name]
        return self.get_base_layer().forward_with_lora(x, self.lora_A[name].weight, b_OR, self.lora_dropout[name])

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> Any:  # noqa: ARG002
        return SideDora() if config.use_dora else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:  # noqa: ARG002
        refuse_merge()


def add_adapter(model: PreTrainedModel, settings: AdapterSettings, adapter_name: str = "default") -> PeftModel:
    """Wrap a model (in place) with a new adapter, or add one to a wrapped model. All other weights are frozen."""
    architecture = architecture_of(model.config)
    config = lora_config(settings, architecture)
    dropouts = settings.dropout_by_target(architecture.family)
    biases = bias_names(architecture, settings.selection, not settings.tune_norms) if settings.tune_biases else ()
    return attach(model, config, adapter_name, settings.selection, dropouts, biases)


def attach(
    model: PreTrainedModel | PeftModel,
    config: LoraConfig,
    adapter_name: str = "default",
    selection: Selection | None = None,
    dropouts: Mapping[str, float] | None = None,
    biases: Collection[str] = (),
) -> PeftModel:
    """Wrap a model as `add_adapter` does, from PEFT's config.

    Adapter weights and fully trained weights are float32 on any base, because 16 bits lose small updates.

    Args:
        selection: Experts that get LoRA, for each MoE layer; None for all.
        dropouts: Dropout by target (ending of a module's name), instead of the config's.
        biases: Hub names of the biases to train.

    Raises:
        UserError: If the model has an adapter already, and is not the PeftModel around it.
    """
    wrapped = isinstance(model, PeftModel)
    if not wrapped and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError("This model already has an adapter; give the PeftModel around it, or load the base again.")
    if wrapped and adapter_name in model.peft_config:
        raise UserError(f"This model already has an adapter '{adapter_name}'; give the new one another name.")
    classes: dict[type, type] = dict.fromkeys(EXPERT_CLASSES, ParamWrapper)
    classes |= {NF4Linear: NF4LoraLinear, RouterGate: RouterLora, RouterInWeightDtype: RouterParamWrapper}
    config._register_custom_module(classes | ({nn.Linear: DenseLoraLinear} if config.use_dora else {}))
    config.base_model_name_or_path = None  # PEFT sets it to the model's name, and warns if it replaces another one
    identity_of(model)  # before PEFT renames the parameters
    with select_experts(model, config, selection), seen_by_peft(model), targets_as_given(), warnings.catch_warnings():
        # PEFT 0.21 warns of patterns that name a parameter, but applies them.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        if wrapped:
            model.add_adapter(adapter_name, config)
            peft_model = model
        else:
            peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    _set_dropouts(peft_model, adapter_name, dropouts or {})
    compute_by_row(peft_model)
    drop_copied_biases(peft_model)
    train_biases(peft_model, biases, adapter_name)
    for name, parameter in peft_model.named_parameters():
        of_adapter = any(
            marker in name for marker in ("lora_", "modules_to_save", ".trained_bias.", ".trainable_tokens_delta.")
        )
        if of_adapter and parameter.dtype != torch.float32:  # also for an adapter that is only loaded, not trained
            parameter.data = parameter.data.float()
        assert of_adapter or not parameter.requires_grad, f"{name} would be trained"
    return peft_model


@contextmanager
def targets_as_given() -> Iterator[None]:
    """Keep PEFT (0.21) from converting targets from transformers 4's names, while an adapter is made inside the block.

    PEFT would take the `gate_proj` of a dense layer or a shared expert for the ones of all experts.
    """
    name = "convert_peft_config_for_transformers"
    convert = getattr(transformers_weight_conversion, name)
    setattr(transformers_weight_conversion, name, lambda *_args, **_kwargs: None)
    try:
        yield
    finally:
        setattr(transformers_weight_conversion, name, convert)


def identity_of(model: PreTrainedModel | PeftModel) -> str | None:
    """Return the fingerprint of a model's base weights, and store it on the model; None if it is unknown."""
    if not isinstance(model, PeftModel) and not hasattr(model, "base_fingerprint"):
        model.base_fingerprint = fingerprint_in_memory(model)
    return getattr(model, "base_fingerprint", None)


def _set_dropouts(model: PeftModel, adapter_name: str, dropouts: Mapping[str, float]) -> None:
    """Set each group's own dropout. PEFT's config has one for all."""
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        full = f"{name}.{module.parameter_name}" if isinstance(module, ParamWrapper) else name
        own = [p for target, p in dropouts.items() if full.replace(".base_layer", "").endswith(target)]
        if own and isinstance(module, ParamWrapper):
            module.dropout_of[adapter_name] = own[0]
        elif own and adapter_name in module.lora_dropout:
            module.lora_dropout[adapter_name] = nn.Dropout(own[0]) if own[0] else nn.Identity()
