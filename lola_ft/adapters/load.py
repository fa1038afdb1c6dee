"""Attaching a stored adapter to a model, and storing an attached one; every tensor is accounted for."""

from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from lola_ft.adapters.attaching import attach
from lola_ft.adapters.files import config_for, read_adapter, write_adapter
from lola_ft.adapters.layouts import PREFIX, from_state, to_state
from lola_ft.adapters.weights import AdapterWeights
from lola_ft.errors import AdapterError
from lola_ft.model import LolaForCausalLM
from lola_ft.model.hub_checkpoint import expected_shapes


def load_adapter(
    model: LolaForCausalLM, path: str | Path, allow_other_base: bool = False, trainable: bool = False
) -> PeftModel:
    """Put a stored adapter of either layout on a model (changed in place; use the returned one from then on).

    Args:
        allow_other_base: Accept an adapter that was trained on other base weights.

    Raises:
        AdapterError: If a tensor of the adapter has no place, or a place no tensor; or if the base is another.
    """
    weights = read_adapter(path).weights(model.config.num_experts)
    weights.check_against(expected_shapes(model.config))
    own = getattr(model, "base_fingerprint", None)
    if own and weights.base_fingerprint and own != weights.base_fingerprint and not allow_other_base:
        raise AdapterError(
            f"{path} was trained on base {weights.base_fingerprint}; this base is {own}. Load its own base, or allow "
            "another one (allow_other_base)."
        )
    state = to_state(weights, "peft", model.config.num_experts)
    config = _loading_config(weights, state, model)
    config.inference_mode = not trainable
    peft_model = attach(model, config)
    _set_state(peft_model, state)
    return peft_model.train(trainable)


def save_adapter(
    model: PeftModel, path: str | Path, layout: str = "peft", also: Callable[[Path], None] | None = None
) -> Path:
    """Store a model's active adapter; `peft` loads with stock PEFT, `per_expert` with the authors' code.

    Args:
        also: Called with the folder before it is put in place, to write what belongs beside the adapter.
    """
    return write_adapter(adapter_weights(model), path, layout, model.config.num_experts, also)


def adapter_weights(model: nn.Module) -> AdapterWeights:
    """The numbers of a model's active adapter, on the CPU, under the Hub's names."""
    if not isinstance(model, PeftModel):
        raise AdapterError("This model has no adapter to save.")
    name = model.active_adapter
    state = {key: tensor.detach().cpu() for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items()}
    weights = from_state(state, model.peft_config[name].to_dict(), model.config.num_experts)
    base = model.get_base_model()
    weights.base = getattr(base, "base_id", "")
    weights.base_fingerprint = getattr(base, "base_fingerprint", None)
    return weights


def _loading_config(weights: AdapterWeights, state: dict[str, Tensor], model: LolaForCausalLM) -> LoraConfig:
    """PEFT's config for the native model; a target is named in full where it covers only some layers."""
    config = config_for(weights, "peft")
    for kind in ("target_modules", "target_parameters", "modules_to_save"):
        if isinstance(config[kind], list):
            config[kind] = [name for target in config[kind] for name in _names_of(target, kind, state, model)]
    known = {key: value for key, value in config.items() if key in LoraConfig.__dataclass_fields__}
    return LoraConfig(**known)


def _names_of(target: str, kind: str, state: dict[str, Tensor], model: LolaForCausalLM) -> list[str]:
    """`[target]` if every module that ends so has a tensor in the state, else the full names of those that have."""
    parts = model.named_parameters() if kind == "target_parameters" else model.named_modules()
    full = [name for name, _ in parts if name.endswith(f".{target}")]
    module_of = {name: name.rpartition(".")[0] if kind == "target_parameters" else name for name in full}
    held = [name for name in full if any(key.startswith(f"{PREFIX}{module_of[name]}.") for key in state)]
    return [target] if held == full else held


def _set_state(model: PeftModel, state: dict[str, Tensor]) -> None:
    places = get_peft_model_state_dict(model)
    missing, unused = sorted(set(places) - set(state)), sorted(set(state) - set(places))
    if missing or unused:
        raise AdapterError(
            f"The adapter does not cover the same weights in every layer: {len(missing)} places without a tensor "
            f"({', '.join(missing[:2])}), {len(unused)} tensors without a place ({', '.join(unused[:2])})."
        )
    wrong = [name for name, tensor in state.items() if tensor.shape != places[name].shape]
    assert not wrong, f"shapes differ after they were checked: {wrong[:3]}"
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys, f"PEFT did not take {result.unexpected_keys[:3]}"
