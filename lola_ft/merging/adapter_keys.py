"""The tensors of an adapter's file that belong to a weight, found by their names, for the proof of a merge.

Only the names of experts come from the family. All other rules are written here again, independently of the merge.
"""

import re
from collections.abc import Collection
from typing import Any

from lola_ft.families import Family

_PREFIX = "base_model.model."
_WRAPPED = ("", ".base_layer", ".base_layer.base_layer")


def factor_keys(name: str, held: Collection[str], config: dict[str, Any], family: Family) -> list[str]:
    """Return the keys of A and B (and of DoRA's lengths), or of a fully trained weight; [] if the file has none.

    Args:
        name: Hub name of the weight.
        held: The file's keys.
        config: `adapter_config.json`.
    """
    for called in (name, _called_in_memory(name, family)):
        if found := _held((called,), held):
            return found
        if found := _pair(called.removesuffix(".weight"), held) if called.endswith(".weight") else []:
            return found
    for called in (name, _called_in_memory(name, family)) if name in family.embeddings else ():
        if found := _held((f"{called.removesuffix('.weight')}.token_adapter.trainable_tokens_delta",), held):
            return found
    if name.endswith(".bias"):
        return _bias(name.removesuffix(".bias"), held, family)
    if not name.endswith(".weight"):
        return []
    module = name.removesuffix(".weight")
    named = expert_of(module, family)
    if named is None or family.experts is None:
        return []
    experts, _, stack = named
    # PEFT wraps the first-named projection first. If both have factors, the first one's are inside, in `base_layer`.
    outer, inner = _pair(experts, held), _pair(f"{experts}.base_layer", held)
    if inner:
        return inner if stack == next(iter(family.experts.stacks)) else outer
    targets = config.get("target_parameters") or ()
    return outer if any(target.endswith(f"experts.{stack}") for target in targets) else []


def expert_of(module: str, family: Family) -> tuple[str, int, str] | None:
    """Split an expert's Hub name into fused module, expert id and fused parameter; return None for other modules."""
    if family.experts is None:
        return None
    for stack, names in family.experts.stacks.items():
        match = re.fullmatch(
            rf"(.+\.)?{re.escape(family.experts.on_disk or family.experts.module)}\.(\d+)\.(\w+)", module
        )
        if match and match[3] in names:
            return f"{match[1] or ''}{family.experts.module}", int(match[2]), stack
    return None


def place_in_stack(module: str, family: Family) -> int:
    """Return the number of projections before this one in its fused parameter: 1 for up, which follows gate; else 0."""
    assert family.experts is not None, "only experts are fused"
    projection = module.rpartition(".")[2]
    return next(names.index(projection) for names in family.experts.stacks.values() if projection in names)


def stacked_row(name: str, key: str, family: Family) -> int | None:
    """Return the row of a stack of biases that belongs to this weight; None if the key is not a stack's."""
    found = expert_of(name.removesuffix(".bias"), family)
    return found[1] if found and key.endswith(f"{found[2]}_bias") else None


def _called_in_memory(name: str, family: Family) -> str:
    """Return the name in memory, and so in PEFT's layout, of a weight outside the experts."""
    for disk, memory in family.renamed.items():
        name = re.sub(rf"\.{re.escape(disk)}\.(\w+)$", rf".{memory}.\1", name)
    return name


def _bias(module: str, held: Collection[str], family: Family) -> list[str]:
    """Return a trained bias's key: its own or its layer's stack's. PEFT's wrappers add `.base_layer` to the name."""
    names = [f"{module}{wrapped}.bias" for wrapped in _WRAPPED]
    if found := expert_of(module, family):
        names += [f"{found[0]}{wrapped}.{found[2]}_bias" for wrapped in _WRAPPED]
    return next((keys for name in names if (keys := _held((name,), held))), [])


def _pair(module: str, held: Collection[str]) -> list[str]:
    factors = (f"{module}.lora_A.weight", f"{module}.lora_B.weight")
    return _held((*factors, f"{module}.lora_magnitude_vector"), held) or _held(factors, held)


def _held(names: tuple[str, ...], held: Collection[str]) -> list[str]:
    """Return the names, with or without PEFT's prefix, if the file holds them all."""
    for prefix in (_PREFIX, ""):
        if all(prefix + name in held for name in names):
            return [prefix + name for name in names]
    return []
