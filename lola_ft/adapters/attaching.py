"""Which weights get LoRA: from plain settings to PEFT's config, and the adapter attached to a model."""

from dataclasses import dataclass
from typing import NoReturn

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES

from lola_ft.adapters.expert_lora import EXPERT_CLASSES, ParamWrapper, refuse_merge
from lola_ft.adapters.targets import ATTENTION_TARGETS, EXPERT_TARGETS, MLP_TARGETS, ROUTER_MODULE
from lola_ft.errors import UserError
from lola_ft.model import LolaForCausalLM
from lola_ft.quantization import NF4Linear


@dataclass(frozen=True)
class AdapterSettings:
    """What to train beside the frozen base.

    Attributes:
        attention_rank, mlp_rank, expert_rank: LoRA rank of each group; None leaves the group out.
        alpha: The update is scaled by alpha / rank (alpha / sqrt(rank) with `rslora`).
        dropout: Of the side path's input.
        tune_router: Train the router's weights as they are and save them with the adapter.
    """

    attention_rank: int | None = None
    mlp_rank: int | None = None
    expert_rank: int | None = None
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    tune_router: bool = False

    def ranks(self) -> dict[str, int]:
        """Rank of each target, by the end of its name."""
        groups = (
            (ATTENTION_TARGETS, self.attention_rank),
            (MLP_TARGETS, self.mlp_rank),
            (EXPERT_TARGETS, self.expert_rank),
        )
        return {target: rank for targets, rank in groups if rank is not None for target in targets}


def lora_config(settings: AdapterSettings) -> LoraConfig:
    """PEFT's config for these settings."""
    ranks = settings.ranks()
    if not ranks and not settings.tune_router:
        raise UserError("Nothing would be trained: give at least one of attention, mlp and experts a rank.")
    # The experts' rank is the common one: PEFT warns of a pattern that names a parameter, though it follows it.
    common = settings.expert_rank or max(ranks.values(), default=1)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=common,
        rank_pattern={target: rank for target, rank in ranks.items() if rank != common},
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=linear_targets(ranks),
        target_parameters=[target for target in ranks if target in EXPERT_TARGETS] or None,
        modules_to_save=[ROUTER_MODULE] if settings.tune_router else None,
    )


def linear_targets(ranks: dict[str, int]) -> list[str] | str:
    """PEFT's `target_modules`; a name of PEFT's that matches nothing where only the router is trained."""
    return sorted(target for target in ranks if target not in EXPERT_TARGETS) if ranks else DUMMY_TARGET_MODULES


class NF4LoraLinear(LoraLinear4bit):
    """PEFT's LoRA on a 4-bit linear layer, but for its merge, which would quantise the merged weight anew."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:  # noqa: ARG002
        refuse_merge()


def attach(model: LolaForCausalLM, config: LoraConfig, adapter_name: str = "default") -> PeftModel:
    """Wrap a model (changed in place) with a fresh adapter; everything else is frozen.

    Adapter weights and a tuned router are float32 whatever the base: small updates vanish in 16 bits.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError("This model already has an adapter; load the base anew.")
    classes: dict[type, type] = dict.fromkeys(EXPERT_CLASSES, ParamWrapper)
    config._register_custom_module(classes | {NF4Linear: NF4LoraLinear})
    config.base_model_name_or_path = None  # PEFT fills in the model's own name, and warns if it replaces one
    peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    for name, parameter in peft_model.named_parameters():
        of_adapter = "lora_" in name or "modules_to_save" in name
        if of_adapter and parameter.dtype != torch.float32:  # also where it is only loaded, not trained
            parameter.data = parameter.data.float()
        assert of_adapter or not parameter.requires_grad, f"{name} would be trained"
    return peft_model
