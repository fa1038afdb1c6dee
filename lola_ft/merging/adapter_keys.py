"""Which tensors of an adapter's file belong to a weight, told from names alone, for checks that trust nothing else."""

import re
from collections.abc import Collection
from typing import Any

_PREFIX = "base_model.model."
_EXPERT = re.compile(r"^(?P<experts>.+\.moe\.experts)\.\d+\.(?P<projection>c_fc|c_proj)$")
_NATIVE = {"c_fc": "experts.up_proj", "c_proj": "experts.down_proj"}


def factor_keys(name: str, held: Collection[str], config: dict[str, Any]) -> list[str]:
    """A's and B's key (and DoRA's lengths'), or a trained weight's one; none if the file leaves this weight alone.

    Args:
        name: The Hub's name of the weight.
        held: The file's keys.
        config: `adapter_config.json`.
    """
    if found := _held((name,), held):
        return found
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


def _pair(module: str, held: Collection[str]) -> list[str]:
    factors = (f"{module}.lora_A.weight", f"{module}.lora_B.weight")
    return _held((*factors, f"{module}.lora_magnitude_vector"), held) or _held(factors, held)


def _held(names: tuple[str, ...], held: Collection[str]) -> list[str]:
    """These names, with or without PEFT's prefix, if the file holds them all."""
    for prefix in (_PREFIX, ""):
        if all(prefix + name in held for name in names):
            return [prefix + name for name in names]
    return []
