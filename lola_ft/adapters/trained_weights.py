"""Fully trained weights in files: routers, norms, biases.

A bias has the name that the base's own bias has after PEFT has wrapped its module, so that stock PEFT finds its place.
The biases of an MoE layer's experts are one stack (E, out) in the layout `peft`, and single tensors in `per_expert`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lola_ft.adapters.weights import AdapterWeights
from lola_ft.errors import AdapterError
from lola_ft.families import Architecture


def trained_name(name: str, architecture: Architecture) -> str | None:
    """Return a fully trained weight's Hub name from its name in a file; for a stack, its name in memory.

    Returns:
        None for a tensor that cannot be fully trained.
    """
    plain = name.replace(".base_layer", "") if name.endswith("bias") else name
    if stack_parts(plain, architecture):
        return plain
    module, _, kind_of_weight = plain.rpartition(".")
    plain = f"{architecture.family.on_disk(module)}.{kind_of_weight}"
    kind = architecture.kind_of(plain)
    trainable = kind is not None and (kind.group in ("router", "norms") or plain.endswith(".bias"))
    trainable |= kind is not None and kind.correction  # PEFT stores it with its router, and requires it when loading
    return plain if trainable else None


def stack_parts(name: str, architecture: Architecture) -> tuple[str, str] | None:
    """Split the name of a stack of experts' biases into the experts' module and the projection on disk."""
    layout = architecture.family.experts
    module, _, leaf = name.rpartition(".")
    if layout is None or not module.endswith(f".{layout.module}"):
        return None
    stacked = layout.stacks.get(leaf.removesuffix("_bias")) if leaf.endswith("_bias") else None
    return (module, stacked[0]) if stacked else None


def split_stacks(weights: AdapterWeights, experts_of: Mapping[str, Sequence[int]]) -> None:
    """Replace each stack of experts' biases by one bias per expert.

    Args:
        experts_of: The experts whose rows a layer's stack holds, for layers where these are not all.
    """
    layout = weights.architecture.family.experts
    for name in list(weights.trained):
        parts = stack_parts(name, weights.architecture)
        if parts is None or layout is None:
            continue
        module, projection = parts
        experts = experts_of.get(module, range(weights.architecture.num_experts))
        stack, keys = weights.trained.pop(name), weights.keys.pop(name)
        if stack.ndim != 2 or len(stack) != len(experts):
            raise AdapterError(
                f"{name}: holds {list(stack.shape)}, not a row for each of {len(experts)} experts. Was the adapter "
                "trained on a base with another number of experts?"
            )
        for place, e in enumerate(experts):
            single = f"{layout.name(module, e, projection)}.bias"
            if single in weights.trained:
                raise AdapterError(f"{name}: expert {e} is in the file twice, in the stack and by itself.")
            weights.trained[single], weights.keys[single] = stack[place], keys


def trained_state(weights: AdapterWeights, layout: str, experts_of: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return the fully trained weights by their names in a file of a layout.

    In the layout `peft` the biases of a layer's experts become one stack (E, out), which the base's biases complete.
    """
    family = weights.architecture.family
    targets = {family.target_of(module, layout) for module in weights.pairs}
    state: dict[str, Tensor] = {}
    stacks: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in weights.trained.items():
        module, _, kind = name.rpartition(".")
        single = family.parse_expert(module)
        if single and layout == "peft":
            stacks[single.module, single.projection][single.expert] = tensor
        else:
            wrapped = kind == "bias" and family.target_of(module, layout) in targets
            held = module if layout == "per_expert" else family.in_memory(module)
            state[f"{held}{'.base_layer' * wrapped}.{kind}"] = tensor
    nesting = ".base_layer" * len(targets.intersection(family.expert_targets))
    for (module, projection), by_expert in stacks.items():
        assert family.experts is not None, "only experts have stacks"
        like = next(iter(by_expert.values()))
        names = {
            e: f"{family.experts.name(module, e, projection)}.bias"
            for e in experts_of.get(module, range(weights.architecture.num_experts))
        }
        rows = [
            by_expert[e] if e in by_expert else _base_row(weights, name).to(like.dtype) for e, name in names.items()
        ]
        state[f"{module}{nesting}.{family.experts.stack_of(projection)}_bias"] = torch.stack(rows)
    return state


def _base_row(weights: AdapterWeights, name: str) -> Tensor:
    """Return the base's bias of an expert that is not trained. Stock PEFT loads whole stacks, so it is needed."""
    if name not in weights.base_biases:
        raise AdapterError(
            f"{name}: the layout peft holds the biases of a layer's experts as one stack. This bias was not trained, "
            "and the base with its value is not loaded. Convert the adapter with `lola-ft convert … --base BASE`, or "
            "keep it in the layout per_expert."
        )
    return weights.base_biases[name]
