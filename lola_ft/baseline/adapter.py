"""LoRA on a dense model: a plain PEFT adapter, attached, stored and loaded with every tensor accounted for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from lola_ft.adapters import AdapterSettings
from lola_ft.adapters.files import CONFIG_FILE, WEIGHTS_FILE, is_replaceable, read_adapter
from lola_ft.adapters.peft_model import attach
from lola_ft.baseline.families import FAMILIES, Family
from lola_ft.baseline.settings import check_settings
from lola_ft.errors import AdapterError, UserError
from lola_ft.files import replace_folder


def add_dense_adapter(model: Any, settings: AdapterSettings) -> PeftModel:
    """Wrap a dense model (changed in place) with a fresh adapter; all else is frozen.

    Raises:
        UserError: As `check_settings`.
    """
    family = FAMILIES[model.config.model_type]
    check_settings(settings, family.name)
    ranks = settings.ranks()
    targets = {target: group for group in ranks for target in family.groups[group]}
    common = next(iter(ranks))
    rank, alpha = ranks[common], settings.alphas.get(common, settings.alpha)
    alphas = {group: settings.alphas.get(group, settings.alpha) for group in ranks}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=_plain(alpha),
        rank_pattern={target: ranks[group] for target, group in targets.items() if ranks[group] != rank},
        alpha_pattern={target: _plain(alphas[group]) for target, group in targets.items() if alphas[group] != alpha},
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        init_lora_weights="gaussian" if settings.init == "gaussian" else True,
        target_modules=sorted(targets),
        fan_in_fan_out=family.in_by_out and model.quantization is None,
    )
    return attach(model, config, dropouts={target: settings.dropout_of(group) for target, group in targets.items()})


def save_dense_adapter(model: PeftModel, path: str | Path, also: Callable[[Path], None] | None = None) -> Path:
    """Store the active adapter, whole or not at all, as stock PEFT loads it on the unquantised model.

    Raises:
        UserError: There is something else at `path`.
    """
    if not is_replaceable(path):
        raise UserError(f"{path}: already there and no adapter. Choose another folder.")
    base, name = model.get_base_model(), model.active_adapter
    family = FAMILIES[base.config.model_type]
    config = model.peft_config[name].to_dict() | {
        "base_model_name_or_path": base.base_id,
        "inference_mode": True,
        "fan_in_fan_out": family.in_by_out,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    held = get_peft_model_state_dict(model, adapter_name=name)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in held.items()}
    with replace_folder(path) as folder:
        # One key alone: safetensors orders several at random, and equal adapters would differ in bytes.
        save_file(state, folder / WEIGHTS_FILE, metadata={"base_fingerprint": base.base_fingerprint})
        (folder / CONFIG_FILE).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if also is not None:
            also(folder)
    return Path(path)


def load_dense_adapter(model: Any, path: str | Path, allow_other_base: bool = False) -> PeftModel:
    """Put a stored adapter on a dense model (changed in place), for evaluation.

    Raises:
        AdapterError: If a tensor of the adapter has no place, or a place no tensor; or if the base is another.
    """
    stored = read_adapter(path)
    own, other = model.base_fingerprint, stored.metadata.get("base_fingerprint")
    if other and own != other and not allow_other_base:
        raise AdapterError(f"{path} was trained on base {other}; this base is {own}. Load its own base.")
    family = FAMILIES[model.config.model_type]
    known = {key: value for key, value in stored.config.items() if key in LoraConfig.__dataclass_fields__}
    known |= {"fan_in_fan_out": family.in_by_out and model.quantization is None, "inference_mode": True}
    try:
        peft_model = attach(model, LoraConfig(**known))
    except ValueError as error:  # PEFT found none of its target modules
        raise AdapterError(f"{path} does not fit this base, a {family.name} model: {error}") from error
    places = get_peft_model_state_dict(peft_model)
    _check_places(
        path, family, {k: e.shape for k, e in stored.entries.items()}, {k: t.shape for k, t in places.items()}
    )
    set_peft_model_state_dict(peft_model, {key: entry.read().float() for key, entry in stored.entries.items()})
    return peft_model.eval()


def _check_places(path: str | Path, family: Family, held: dict[str, Any], places: dict[str, Any]) -> None:
    missing, unused = sorted(set(places) - set(held)), sorted(set(held) - set(places))
    if missing or unused:
        raise AdapterError(
            f"{path} does not fit this base, a {family.name} model: {len(missing)} places without a tensor "
            f"({', '.join(missing[:2])}), {len(unused)} tensors without a place ({', '.join(unused[:2])})."
        )
    if wrong := [key for key in held if tuple(held[key]) != tuple(places[key])]:
        shapes = f"{list(held[wrong[0]])}, not {list(places[wrong[0]])}"
        raise AdapterError(f"{path} does not fit this base: tensor '{wrong[0]}' has shape {shapes}.")


def _plain(alpha: float) -> float:
    return alpha if alpha % 1 else int(alpha)
