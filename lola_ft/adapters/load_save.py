"""Loading a stored adapter onto a model, and saving an attached one. No tensor is lost without an error."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from lola_ft.adapters.expert_lora import ParamWrapper
from lola_ft.adapters.layouts import PREFIX, from_state, to_state
from lola_ft.adapters.on_disk import config_for, read_adapter, write_adapter
from lola_ft.adapters.peft_model import attach, identity_of
from lola_ft.adapters.shared_inputs import sharing_inputs
from lola_ft.adapters.token_rows import grow_embeddings
from lola_ft.adapters.trained_bias import partly_trained, plain_key
from lola_ft.adapters.trained_weights import stack_parts
from lola_ft.adapters.weights import AdapterWeights
from lola_ft.errors import AdapterError
from lola_ft.families import Family, architecture_of
from lola_ft.model.experts import FusedExperts

REFERENCE_NAME = "ref"
"""Name of the adapter that TRL (1.16) uses as the reference of DPO and KTO. Without it, TRL uses the base."""


def load_adapter(
    model: PreTrainedModel | PeftModel,
    path: str | Path,
    allow_other_base: bool = False,
    trainable: bool = False,
    name: str = "default",
) -> PeftModel:
    """Load a stored adapter of either layout onto a model, which is changed in place; use the returned model.

    Args:
        model: A base; or a model with an adapter, which gets another one besides. The new one becomes active.
        path: The adapter's folder.
        allow_other_base: Accept an adapter that was trained on other base weights.
        trainable: Allow further training, without dropout. Otherwise the adapter is frozen, and the model refuses to
            run in training mode with gradients unless something else in it is trained.
        name: The adapter's name, for `set_adapter`.

    Raises:
        AdapterError: If a tensor of the adapter has no place, or a place has no tensor; or if the base is another one.
    """
    own, stored = identity_of(model), read_adapter(path)
    architecture = architecture_of(model.config)
    rows = stored.vocabulary(architecture.sizes.vocab)
    weights = stored.weights(architecture.with_vocabulary(rows))
    weights.check_fit()
    if own and weights.base_fingerprint and own != weights.base_fingerprint and not allow_other_base:
        raise AdapterError(
            f"{path} was trained on base {weights.base_fingerprint}; this base is {own}. Load the adapter's own base, "
            "or pass allow_other_base=True."
        )
    if weights.starts_at_rounding_error and getattr(model, "quantization", None) is None:
        raise AdapterError(
            f"{path}: this adapter started at the rounding error of the 4-bit base (init loftq) and corrects it; on "
            "unrounded weights it would be wrong. Load the base with quantization='nf4'."
        )
    grow_embeddings(model.get_base_model() if isinstance(model, PeftModel) else model, rows)
    return put_weights(model, weights, name, trainable)


def put_weights(
    model: PreTrainedModel | PeftModel,
    weights: AdapterWeights,
    name: str,
    trainable: bool,
    dropouts: Mapping[str, float] | None = None,
) -> PeftModel:
    """Attach an adapter with these weights and make it the active one.

    Args:
        dropouts: Dropout by target (ending of a module's name); 0 for the others.
    """
    weights = sharing_inputs(weights)
    experts_of = weights.experts_of()
    state = to_state(weights, "peft", experts_of)
    config = _loading_config(weights, state, model)
    config.fan_in_fan_out = False  # in memory every linear layer is out×in
    config.inference_mode, config.bias = not trainable, "none"  # with `all` PEFT would train the base's own biases
    selection = _selection(model, weights, experts_of) if experts_of else None
    peft_model = attach(model, config, name, selection, dropouts, weights.biases())
    _set_state(peft_model, state, name)
    peft_model.peft_config[name].starts_at_rounding_error = weights.starts_at_rounding_error
    peft_model.set_adapter(name, inference_mode=not trainable)
    if not (trainable or isinstance(model, PeftModel)):
        peft_model.register_forward_pre_hook(_refuse_to_train_nothing)
    return peft_model.train(trainable)


def _refuse_to_train_nothing(model: nn.Module, _inputs: tuple[Any, ...]) -> None:
    """Refuse a training step in which no weight is trained: gradients would be 0 or missing, without a message.

    Raises:
        AdapterError: If nothing is trained. The message says how to load an adapter for training.
    """
    if not (model.training and torch.is_grad_enabled()) or any(p.requires_grad for p in model.parameters()):
        return
    raise AdapterError(
        "This model is in training mode, and nothing of it is trained: its adapter was loaded frozen. Load it with "
        "lola_ft.load_adapter(model, path, trainable=True); to use it, call model.eval() or compute in torch.no_grad()."
    )


def add_reference(model: PeftModel, weights: AdapterWeights) -> None:
    """Add a frozen copy of an adapter under the name that TRL's trainers use as the reference."""
    active = model.active_adapter
    put_weights(model, weights, REFERENCE_NAME, trainable=False)
    model.set_adapter(active)
    model.train()


def save_adapter(
    model: PeftModel, path: str | Path, layout: str = "peft", also: Callable[[Path], None] | None = None
) -> Path:
    """Save a model's active adapter and return its folder.

    Args:
        layout: `peft` loads with stock PEFT, `per_expert` with the code of LOLA's authors.
        also: Function that writes further files into the folder, before the folder is put in place.
    """
    return write_adapter(adapter_weights(model), path, layout, also)


def fitting_layout(model: PeftModel) -> str:
    """Return `per_expert` if only some experts have LoRA, because `peft` holds zeros for the others; else `peft`."""
    num_experts = architecture_of(model.config).num_experts
    some = any(len(ids) < num_experts for ids in experts_of(model, model.active_adapter).values())
    dora = any(".lora_magnitude_vector." in name for name, _ in model.named_parameters())
    tokens = model.peft_config[model.active_adapter].trainable_token_indices
    return "per_expert" if some and not dora and not tokens else "peft"


def adapter_weights(model: nn.Module, name: str | None = None) -> AdapterWeights:
    """Return the weights of an adapter (by default the active one) on the CPU, by Hub names."""
    if not isinstance(model, PeftModel):
        raise AdapterError("This model has no adapter to save.")
    name = name or model.active_adapter
    config = model.peft_config[name]
    held = get_peft_model_state_dict(model, adapter_name=name)
    state = {plain_key(key): tensor.detach().cpu() for key, tensor in held.items()}
    weights = from_state(state, config.to_dict(), architecture_of(model.config), experts_of(model, name))
    weights.base_biases = _untrained_biases(model, name)
    base = model.get_base_model()
    weights.base, weights.revision = getattr(base, "base_id", ""), getattr(base, "base_revision", None)
    weights.base_fingerprint = getattr(base, "base_fingerprint", None)
    weights.starts_at_rounding_error = getattr(config, "starts_at_rounding_error", False)
    return weights


def experts_of(model: PeftModel, name: str) -> dict[str, tuple[int, ...]]:
    """Return the experts with LoRA or trained biases, by the Hub name of their layer.

    Layers without any are left out, and layers whose experts have no LoRA but all biases trained.
    """
    found = {
        plain_name(path): module.experts_of[name]
        for path, module in model.named_modules()
        if isinstance(module, ParamWrapper) and name in module.experts_of
    }
    return found | {
        parameter.rpartition(".")[0]: experts for parameter, (experts, _) in partly_trained(model, name).items()
    }


def plain_name(path: str) -> str:
    """Return a module's or parameter's name without the additions of PEFT's wrappers."""
    return path.removeprefix(PREFIX).replace(".base_layer", "")


def _untrained_biases(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the base's biases of experts that an adapter leaves out, by Hub names; {} if it trains no biases."""
    architecture, found = architecture_of(model.config), dict[str, Tensor]()
    for parameter, (chosen, stack) in partly_trained(model, name).items():
        parts, layout = stack_parts(parameter, architecture), architecture.family.experts
        assert parts is not None, f"{parameter} is no stack of experts' biases"
        assert layout is not None, "only experts have stacks"
        rest = set(range(len(stack))).difference(chosen)
        found |= {f"{layout.name(parts[0], e, parts[1])}.bias": stack[e].cpu() for e in rest}
    return found


def _selection(
    model: nn.Module, weights: AdapterWeights, experts_of: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[int, ...], ...]:
    """List the experts with LoRA or trained biases of each MoE layer, in order."""
    layers = [(plain_name(name), module) for name, module in model.named_modules() if isinstance(module, FusedExperts)]
    names = [*weights.pairs, *(name.removesuffix(".bias") for name in weights.trained)]
    held = {expert.module for name in names if (expert := weights.architecture.family.parse_expert(name))}
    return tuple(
        experts_of.get(name, tuple(range(module.num_experts))) if name in held else () for name, module in layers
    )


def _loading_config(weights: AdapterWeights, state: dict[str, Tensor], model: PreTrainedModel) -> LoraConfig:
    """Return PEFT's config for the native model. A target that covers only some layers is named in full."""
    config = _naming_modules(config_for(weights, "peft"), weights.architecture.family)
    for kind in ("target_modules", "target_parameters", "modules_to_save"):
        if isinstance(config[kind], list):
            config[kind] = [name for target in config[kind] for name in _names_of(target, kind, state, model)]
    known = {key: value for key, value in config.items() if key in LoraConfig.__dataclass_fields__}
    return LoraConfig(**known)


def _naming_modules(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Return the config with linear layers as target modules. Stock PEFT gets some of them as target parameters."""

    def plain(target: str) -> str:
        return target if target in family.parameter_targets else target.removesuffix(".weight")

    targets = [plain(target) for target in config["target_parameters"] or ()]
    modules = [target for target in targets if target not in family.parameter_targets]
    parameters = [target for target in targets if target in family.parameter_targets]
    changed = config | {"target_parameters": parameters or None}
    if modules:
        named = config["target_modules"]
        changed["target_modules"] = [*(named if isinstance(named, list) else ()), *modules]
    for pattern in ("rank_pattern", "alpha_pattern"):
        changed[pattern] = {plain(target): value for target, value in config[pattern].items()}
    return changed


def _names_of(target: str, kind: str, state: dict[str, Tensor], model: PreTrainedModel) -> list[str]:
    """Return `[target]` if every module with this ending has a tensor in the state, else the full names of those."""
    parts = model.named_parameters() if kind == "target_parameters" else model.named_modules()
    full = list(dict.fromkeys(plain_name(name) for name, _ in parts if plain_name(name).endswith(f".{target}")))
    module_of = {name: name.rpartition(".")[0] if kind == "target_parameters" else name for name in full}
    mark = ".weight" if kind == "modules_to_save" else ".lora_"  # matches no bias that is trained without its weight
    held = [
        name for name in full if any(key.startswith(f"{PREFIX}{module_of[name]}.") and mark in key for key in state)
    ]
    return [target] if held == full else held


def _set_state(model: PeftModel, state: dict[str, Tensor], name: str) -> None:
    held = get_peft_model_state_dict(model, adapter_name=name)
    places = {plain_key(key): tensor for key, tensor in held.items()}
    state = {plain_key(key): tensor for key, tensor in state.items()}
    missing, unused = sorted(set(places) - set(state)), sorted(set(state) - set(places))
    if missing or unused:
        raise AdapterError(
            f"The adapter does not cover the same weights in every layer: {len(missing)} places without a tensor "
            f"({', '.join(missing[:2])}), {len(unused)} tensors without a place ({', '.join(unused[:2])})."
        )
    wrong = [key for key, tensor in state.items() if tensor.shape != places[key].shape]
    assert not wrong, f"shapes differ after they were checked: {wrong[:3]}"
    result = set_peft_model_state_dict(model, {key: state[plain_key(key)] for key in held}, adapter_name=name)
    assert not result.unexpected_keys, f"PEFT did not take {result.unexpected_keys[:3]}"
