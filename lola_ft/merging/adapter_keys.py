"""Which tensors of an adapter's file belong to a weight, told from names alone, for checks that trust nothing else."""

import re
from collections.abc import Collection
from typing import Any

_PREFIX = "base_model.model."
_EXPERT = re.compile(r"^(?P<experts>.+\.moe\.experts)\.\d+\.(?P<projection>c_fc|c_proj)$")
_NATIVE = {"c_fc": "experts.up_proj", "c_proj": "experts.down_proj"}
_WRAPPED = ("", ".base_layer", ".base_layer.base_layer")


def factor_keys(name: str, held: Collection[str], config: dict[str, Any]) -> list[str]:
    """A's and B's key (and DoRA's lengths'), or a trained weight's one; none if the file leaves this weight alone.

    Args:
        name: The Hub's name of the weight.
        held: The file's keys.
        config: `adapter_config.json`.
    """
    if found := _held((name,), held):
        return found
    if name.endswith(".bias"):
        return _bias(name.removesuffix(".bias"), held)
    if not name.endswith(".weight"):
        return []
    module = name.removesuffix(".weight")
    if found := _pair(module, held):
        return found
    expert = _EXPERT.match(module)
    if expert is None:
        return []
    # PEFT wraps the first-named projection first, so with both its factors lie inside, under `base_layer`.
    outer, inner = _pair(expert["experts"], held), _pair(f"{expert['experts']}.base_layer", held)
    if inner:
        return inner if expert["projection"] == "c_fc" else outer
    targets = config.get("target_parameters") or ()
    return outer if any(target.endswith(_NATIVE[expert["projection"]]) for target in targets) else []


def stacked_row(name: str, key: str) -> int | None:
    """The row of a stack of biases that is this weight's; None if the key is of the weight alone."""
    return int(name.split(".experts.")[1].split(".")[0]) if key.endswith("_proj_bias") else None


def _bias(module: str, held: Collection[str]) -> list[str]:
    """A trained bias's key, by itself or in its layer's stack; PEFT's wrappers leave `.base_layer` in it."""
    names = [f"{module}{wrapped}.bias" for wrapped in _WRAPPED]
    if expert := _EXPERT.match(module):
        native = _NATIVE[expert["projection"]].removeprefix("experts.")
        names += [f"{expert['experts']}{wrapped}.{native}_bias" for wrapped in _WRAPPED]
    return next((found for name in names if (found := _held((name,), held))), [])


def _pair(module: str, held: Collection[str]) -> list[str]:
    factors = (f"{module}.lora_A.weight", f"{module}.lora_B.weight")
    return _held((*factors, f"{module}.lora_magnitude_vector"), held) or _held(factors, held)


def _held(names: tuple[str, ...], held: Collection[str]) -> list[str]:
    """These names, with or without PEFT's prefix, if the file holds them all."""
    for prefix in (_PREFIX, ""):
        if all(prefix + name in held for name in names):
            return [prefix + name for name in names]
    return []
