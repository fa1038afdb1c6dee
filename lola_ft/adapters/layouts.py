"""The two layouts of an adapter on disk, to and from `AdapterWeights`.

`peft`: what PEFT writes for the native model; an MoE layer's experts share one A (E*R, in) and one B (out, R*E).
`per_expert`: the authors'; one A (R, in) and B (out, R) an expert, under Conv1D names.
Both call linear layers by the same names and hold a router's trained weight as it is.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lola_ft.adapters.stacks import join_a, join_b, split_a, split_b
from lola_ft.adapters.targets import TIED_MODULES, TIED_REASON
from lola_ft.adapters.trained_state import split_stacks, trained_name, trained_state
from lola_ft.adapters.weights import EXPERT_MODULE, AdapterWeights, LoraPair
from lola_ft.errors import AdapterError
from lola_ft.model.layout import EXPERT_PROJECTIONS

LAYOUTS = ("peft", "per_expert")
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
FUSED = re.compile(r"^(?P<experts>.+\.moe\.experts)(?P<inner>\.base_layer)?$")
_LORA_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>A\.weight|B\.weight|magnitude_vector)$")
_DISK_NAME = {fused: disk for disk, fused in EXPERT_PROJECTIONS.items()}


def from_state(
    state: dict[str, Tensor],
    config: dict[str, Any],
    num_experts: int,
    experts_of: Mapping[str, Sequence[int]] | None = None,
) -> AdapterWeights:
    """Read either layout's tensors; every one is used, or it is an error.

    Args:
        state: Tensors by their name in the file.
        config: `adapter_config.json`.
        num_experts: Of the base, to cut fused factors apart.
        experts_of: The experts that a layer's fused factors are of, where these are not all.
    """
    weights = AdapterWeights(
        {},
        rslora=bool(config.get("use_rslora")),
        base=config.get("base_model_name_or_path") or "",
        revision=config.get("revision"),
    )
    factors, keys = _sort_factors(state, weights)
    split_stacks(weights, num_experts, experts_of or {})
    for module, pair in factors.items():
        pair_keys = tuple(keys[module, factor] for factor in pair)
        fused = FUSED.match(module)
        if fused is None:
            _check_rank(module, pair, config, 1)
            weights.keys[module] = pair_keys
            weights.pairs[module] = LoraPair(pair["A"], pair["B"], _alpha(module, config), pair.get("magnitude"))
            continue
        projection = _fused_projection(fused, factors, config)
        named = f"{fused['experts']}.{projection}"
        experts = (experts_of or {}).get(fused["experts"], range(num_experts))
        _check_rank(named, pair, config, len(experts))
        a_ERI, b_EOR = split_a(pair["A"], len(experts)), split_b(pair["B"], len(experts))
        for place, e in enumerate(experts):
            single = f"{fused['experts']}.{e}.{_DISK_NAME[projection]}"
            if single in factors:
                raise AdapterError(f"{named}: the file holds it twice, as a stack and for expert {e} alone.")
            weights.keys[single] = pair_keys
            weights.pairs[single] = LoraPair(
                a_ERI[place].contiguous(), b_EOR[place].contiguous(), _alpha(named, config)
            )
    return weights


def _sort_factors(
    state: dict[str, Tensor], weights: AdapterWeights
) -> tuple[dict[str, dict[str, Tensor]], dict[tuple[str, str], str]]:
    """Factors by module and kind, and their keys; weights trained as they are go where they belong.

    Raises:
        AdapterError: Naming the tensors that have no place in LOLA.
    """
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    keys: dict[tuple[str, str], str] = {}
    unknown: list[str] = []
    incomplete: list[str] = []
    for key, tensor in sorted(state.items()):
        name = key.removeprefix(PREFIX)
        match = _LORA_KEY.match(name)
        if match:
            kind = match["factor"].removesuffix(".weight").removesuffix("_vector")
            if tensor.ndim == (1 if kind == "magnitude" else 2) and kind not in factors[match["module"]]:
                factors[match["module"]][kind] = tensor
                keys[match["module"], kind] = key
                continue
        else:
            plain = trained_name(name)
            if plain is not None and plain not in weights.trained:
                weights.trained[plain] = tensor
                weights.keys[plain] = (key,)
                continue
        unknown.append(key)
    for module, pair in factors.items():
        allowed = ({"A", "B"},) if FUSED.match(module) else ({"A", "B"}, {"A", "B", "magnitude"})
        if set(pair) not in allowed:
            incomplete.append(f"{module} (holds {', '.join(sorted(pair))} alone)")
    if incomplete and not unknown:
        raise AdapterError(
            f"{len(incomplete)} modules lack a LoRA factor, or have DoRA's lengths where there can be none: "
            f"{', '.join(sorted(incomplete)[:3])}."
        )
    if unknown:
        tied = any(part in TIED_MODULES for key in unknown for part in key.split("."))
        raise AdapterError(
            f"{len(unknown)} adapter tensors have no place in LOLA: {', '.join(sorted(unknown)[:3])}. "
            + f"{TIED_REASON} " * tied
            + "lola_ft takes LoRA pairs of attention, dense MLP, experts and router, trained weights of router and "
            "norms, and trained biases."
        )
    return factors, keys


def to_state(
    weights: AdapterWeights,
    layout: str,
    num_experts: int,
    experts_of: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a layout, by their name in the file; bit-equal to those they were read from.

    Args:
        experts_of: The experts to stack in a layer, where these are not all. In a file of the layout `peft` they must
            be all, the others zeros: stock PEFT knows no choice.
    """
    plain = [module for module, pair in weights.pairs.items() if pair.magnitude is None]
    if layout == "per_expert" and weights.dora and plain:
        raise AdapterError(
            f"This adapter uses DoRA on some modules and plain LoRA on others ({plain[0]}), which the layout "
            "per_expert cannot hold: the authors' code would want lengths for all of them. Keep it in the layout peft, "
            "or merge it."
        )
    trained = trained_state(weights, layout, num_experts, experts_of or {})
    state = {f"{PREFIX}{name}": tensor for name, tensor in trained.items()}
    stacks: dict[tuple[str, str], dict[int, LoraPair]] = defaultdict(dict)
    for module, pair in weights.pairs.items():
        single = EXPERT_MODULE.match(module)
        if single is None or layout == "per_expert":
            state |= _pair_state(module, pair.a, pair.b)
            if pair.magnitude is not None:
                state[f"{PREFIX}{module}.lora_magnitude_vector"] = pair.magnitude
        else:
            stacks[single["experts"], EXPERT_PROJECTIONS[single["proj"]]][int(single["expert"])] = pair
    if len({frozenset(e for e, p in stacks if p == projection) for _, projection in stacks}) > 1:
        raise AdapterError(
            "Some layers have LoRA on both projections of their experts, some on one: only per_expert can hold it."
        )
    for (experts, projection), by_expert in stacks.items():
        wanted = (experts_of or {}).get(experts, range(num_experts))
        a_ERI, b_EOR = _stack(by_expert, wanted, f"{experts}.{projection}")
        # PEFT nests the wrappers: up_proj's lies inside down_proj's where both have one.
        inner = projection == "up_proj" and (experts, "down_proj") in stacks
        state |= _pair_state(experts + ".base_layer" * inner, join_a(a_ERI), join_b(b_EOR))
    return {key: tensor.contiguous() for key, tensor in sorted(state.items())}


def detect_layout(names: Iterable[str]) -> str:
    """`per_expert` if a tensor belongs to one numbered expert, else `peft`."""
    modules = (re.split(r"\.lora_|\.base_layer|\.bias$", name.removeprefix(PREFIX))[0] for name in names)
    return "per_expert" if any(EXPERT_MODULE.match(module) for module in modules) else "peft"


def _pair_state(module: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}


def _stack(by_expert: dict[int, LoraPair], experts: Sequence[int], name: str) -> tuple[Tensor, Tensor]:
    """Fused factors (E, R, in) and (E, out, R); an expert without a pair gets zeros, which change nothing."""
    some = next(iter(by_expert.values()))
    if {(pair.a.shape, pair.b.shape, pair.alpha) for pair in by_expert.values()} != {
        (some.a.shape, some.b.shape, some.alpha)
    }:
        raise AdapterError(f"{name}: its experts differ in rank or alpha, which only the layout per_expert can hold.")
    a = [by_expert[e].a if e in by_expert else torch.zeros_like(some.a) for e in experts]
    b = [by_expert[e].b if e in by_expert else torch.zeros_like(some.b) for e in experts]
    return torch.stack(a), torch.stack(b)


def _fused_projection(fused: re.Match[str], factors: dict[str, dict[str, Tensor]], config: dict[str, Any]) -> str:
    """Which projection a fused pair belongs to: wrappers nest, and the config tells which one stands alone."""
    if fused["inner"]:
        return "up_proj"
    if f"{fused['experts']}.base_layer" in factors:
        return "down_proj"
    targets = {target.rpartition(".")[2] for target in config.get("target_parameters") or ()}
    if len(targets) != 1 or not targets <= set(_DISK_NAME):
        raise AdapterError(
            f"{fused['experts']}: target_parameters {sorted(targets)} do not tell which projection it is."
        )
    return targets.pop()


def _check_rank(name: str, pair: dict[str, Tensor], config: dict[str, Any], num_experts: int) -> None:
    """Both factors must have the config's rank, times the experts that they are stacked for."""
    rank = int(_setting("rank_pattern", "r", name, config))
    rows, columns = pair["A"].shape[0], pair["B"].shape[1]
    if {rows, columns} != {rank * num_experts}:
        stacked = f" for each of {num_experts} experts, {rank * num_experts} in all" if num_experts > 1 else ""
        hint = " Was the adapter trained on a base with another number of experts?" if num_experts > 1 else ""
        raise AdapterError(
            f"{name}: A has {rows} rows and B {columns} columns, but {CONFIG_FILE} gives rank {rank}{stacked}.{hint}"
        )


def _alpha(name: str, config: dict[str, Any]) -> float:
    return float(_setting("alpha_pattern", "lora_alpha", name, config))


def _setting(pattern_key: str, common_key: str, name: str, config: dict[str, Any]) -> Any:
    """A module's own value, or the common one; the first pattern that matches counts, as in PEFT."""
    pattern = config.get(pattern_key) or {}
    first = next((end for end in pattern if re.match(rf"(?:.*\.)?(?:{end})$", name)), name)
    value = pattern.get(first, config.get(common_key))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AdapterError(f"{CONFIG_FILE} gives no {common_key} for {name}.")
    return value
