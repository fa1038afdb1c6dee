"""How files hold weights that were trained as they are: routers, LayerNorms, biases.

A bias has the name that the base's own has once PEFT has wrapped its module: under that one stock PEFT puts it into the
base. In the layout `peft` the biases of an MoE layer's experts are one stack (E, out), in `per_expert` each by itself.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lola_ft.adapters.targets import EXPERT_TARGETS, target_of
from lola_ft.adapters.weights import EXPERT_MODULE, AdapterWeights
from lola_ft.errors import AdapterError
from lola_ft.model.layout import EXPERT_PROJECTIONS

_TRAINED = re.compile(
    r"\.moe\.gate\.weight$|\.ln_[12f]\.(weight|bias)$|\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.bias$"
    r"|\.moe\.experts\.\d+\.(c_fc|c_proj)\.bias$"
)
_STACK = re.compile(r"^(?P<experts>.+\.moe\.experts)\.(?P<projection>up_proj|down_proj)_bias$")
_DISK_NAME = {fused: disk for disk, fused in EXPERT_PROJECTIONS.items()}


def trained_name(name: str) -> str | None:
    """A trained weight's name in a file as the Hub (for a stack, the native model) has it; None for anything else."""
    plain = name.replace(".base_layer", "") if name.endswith("bias") else name
    return plain if _TRAINED.search(plain) or _STACK.match(plain) else None


def split_stacks(weights: AdapterWeights, num_experts: int, experts_of: Mapping[str, Sequence[int]]) -> None:
    """Put each expert's bias in the place of its layer's stack, which has a row an expert.

    Args:
        experts_of: The experts that a layer's stack is of, where these are not all.
    """
    for name in list(weights.trained):
        stack_of = _STACK.match(name)
        if stack_of is None:
            continue
        experts = experts_of.get(stack_of["experts"], range(num_experts))
        stack, keys = weights.trained.pop(name), weights.keys.pop(name)
        if stack.ndim != 2 or len(stack) != len(experts):
            raise AdapterError(
                f"{name}: holds {list(stack.shape)}, not a row for each of {len(experts)} experts. Was the adapter "
                "trained on a base with another number of experts?"
            )
        for place, e in enumerate(experts):
            single = f"{stack_of['experts']}.{e}.{_DISK_NAME[stack_of['projection']]}.bias"
            if single in weights.trained:
                raise AdapterError(f"{name}: the file holds it twice, as a stack and for expert {e} alone.")
            weights.trained[single], weights.keys[single] = stack[place], keys


def trained_state(
    weights: AdapterWeights, layout: str, num_experts: int, experts_of: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """The trained weights by their names in a file of a layout."""
    targets = {target_of(module, layout) for module in weights.pairs}
    state: dict[str, Tensor] = {}
    stacks: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in weights.trained.items():
        module, _, kind = name.rpartition(".")
        single = EXPERT_MODULE.match(module)
        if single and layout == "peft":
            stacks[single["experts"], single["proj"]][int(single["expert"])] = tensor
        else:
            wrapped = kind == "bias" and target_of(module, layout) in targets
            state[f"{module}{'.base_layer' * wrapped}.{kind}"] = tensor
    nesting = ".base_layer" * len(targets.intersection(EXPERT_TARGETS))
    for (experts, projection), by_expert in stacks.items():
        like = next(iter(by_expert.values()))
        rows = [
            by_expert[e] if e in by_expert else _base_row(weights, f"{experts}.{e}.{projection}.bias").to(like.dtype)
            for e in experts_of.get(experts, range(num_experts))
        ]
        state[f"{experts}{nesting}.{EXPERT_PROJECTIONS[projection]}_bias"] = torch.stack(rows)
    return state


def _base_row(weights: AdapterWeights, name: str) -> Tensor:
    """The base's bias of an expert that is left alone, which stock PEFT will put into the base with the others."""
    if name not in weights.base_biases:
        raise AdapterError(
            f"{name}: the layout peft holds the biases of a layer's experts as one stack, and this one was not trained "
            "and is not at hand. Convert the adapter with `lola-ft convert … --base BASE`, or keep it in the layout "
            "per_expert."
        )
    return weights.base_biases[name]
