"""What an adapter's config says that the file holds, in the Hub's names: a tensor that is lost must be missed."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from lola_ft.model.layout import place_of

_LAYER = re.compile(r"\.h\.(\d+)\.")
_HEAD = "lm_head"


def announced_modules(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    """Modules with LoRA, and modules trained as they are, by PEFT's rules for `adapter_config.json`.

    Args:
        shapes: The base's tensors.
    """
    modules = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    matrices = [module for module in modules if len(shapes[f"{module}.weight"]) == 2]
    conv1d = bool(config.get("fan_in_fan_out"))  # the authors' model, in which an expert's projections are modules
    experts = [module for module in matrices if place_of(f"{module}.weight").expert_id is not None]
    linear = [module for module in (*matrices, _HEAD) if conv1d or module not in experts]
    lora = [
        module
        for module in linear
        if _matches(module, config.get("target_modules"))
        and not _matches(module, config.get("exclude_modules"))
        and _in_layers(module, config.get("layers_to_transform"))
    ]
    targets = config.get("target_parameters")
    lora += [module for module in experts if _matches(place_of(f"{module}.weight").parameter, targets)]
    return lora, [module for module in modules if _matches(module, config.get("modules_to_save"))]


def _matches(name: str, targets: str | Collection[str] | None) -> bool:
    """A regular expression for the whole name, or ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


def _in_layers(module: str, layers: int | Collection[int] | None) -> bool:
    layer = _LAYER.search(module)
    if layers is None or layer is None:
        return layers is None
    return int(layer[1]) in ([layers] if isinstance(layers, int) else layers)
