"""The modules that an adapter's config declares, by Hub names, to find tensors that are missing in its file."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from lola_ft.families import Architecture


def declared_modules(config: Mapping[str, Any], architecture: Architecture) -> tuple[list[str], list[str]]:
    """List the modules with LoRA and the fully trained ones that a config declares, by PEFT's rules.

    Args:
        config: `adapter_config.json`.
    """
    places = architecture.places
    modules = [name.removesuffix(".weight") for name in places if name.endswith(".weight")]
    matrices = [module for module in modules if len(places[f"{module}.weight"].shape) == 2]
    conv1d = bool(config.get("fan_in_fan_out"))  # LOLA's authors' model, where experts' projections are modules
    experts = [module for module in matrices if places[f"{module}.weight"].expert is not None]
    head = architecture.family.embeddings[1].removesuffix(".weight")
    linear = [module for module in (*matrices, head) if conv1d or module not in experts]
    lora = [
        module
        for module in linear
        if _matches(module, config.get("target_modules"))
        and not _matches(module, config.get("exclude_modules"))
        and _in_layers(places.get(f"{module}.weight"), config.get("layers_to_transform"))
    ]
    targets = config.get("target_parameters")
    held = {module: places[f"{module}.weight"].parameter for module in matrices}
    lora += [module for module in matrices if module not in lora and _matches(held[module], targets)]
    return lora, [module for module in modules if _matches(module, config.get("modules_to_save"))]


def _matches(name: str, targets: str | Collection[str] | None) -> bool:
    """Return True if a name matches: a string is a regular expression for the whole name, a list has endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


def _in_layers(place: Any, layers: int | Collection[int] | None) -> bool:
    layer = None if place is None else place.layer
    if layers is None or layer is None:
        return layers is None
    return layer in ([layers] if isinstance(layers, int) else layers)
