"""The two layouts of an adapter on disk, to and from `AdapterWeights`.

`peft`: the layout that PEFT writes for the model in memory. An MoE layer's experts share one A (E*R, in) and one B
(out, R*E).
`per_expert`: the layout of LOLA's authors. Each expert has its own A (R, in) and B (out, R), named as in the
checkpoint.
Both use the same names for linear layers, and hold a router's trained weight unchanged.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lola_ft.adapters.shared_inputs import joined_pair
from lola_ft.adapters.stacks import join_a, join_b, split_a, split_b
from lola_ft.adapters.trained_weights import split_stacks, trained_name, trained_state
from lola_ft.adapters.weights import AdapterWeights, LoraPair
from lola_ft.errors import AdapterError
from lola_ft.families import Architecture, ExpertLayout

LAYOUTS = ("peft", "per_expert")
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
_LORA_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>A\.weight|B\.weight|magnitude_vector)$")
_TOKEN_ROWS = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta$")
_NUMBERED_EXPERT = re.compile(r"\.experts\.\d+\.")  # in every family


def from_state(
    state: dict[str, Tensor],
    config: dict[str, Any],
    architecture: Architecture,
    experts_of: Mapping[str, Sequence[int]] | None = None,
) -> AdapterWeights:
    """Read the tensors of either layout. A tensor that cannot be used is an error.

    Args:
        state: Tensors by their name in the file.
        config: `adapter_config.json`.
        architecture: The base's.
        experts_of: The experts that a layer's fused factors belong to, for layers where these are not all.
    """
    weights = AdapterWeights(
        architecture,
        rslora=bool(config.get("use_rslora")),
        base=config.get("base_model_name_or_path") or "",
        revision=config.get("revision"),
    )
    layout = architecture.family.experts
    weights.token_ids = token_ids_in(config)
    # 1. Factors by module and kind; fully trained weights go into `weights`, with stacks of biases split by expert.
    factors, keys = _sort_factors(state, weights)
    split_stacks(weights, experts_of or {})
    for module, pair in factors.items():
        pair_keys = tuple(keys[module, factor] for factor in pair)
        fused = _fused_module(module, layout)
        # 2. A pair of a single module: A (R, in) and B (out, R)
        if fused is None or layout is None:
            named, name = _named_in_config(module, config), architecture.family.on_disk(module)
            _check_rank(named, pair, config, 1)
            weights.keys[name] = pair_keys
            weights.pairs[name] = LoraPair(pair["A"], pair["B"], _alpha(named, config), pair.get("magnitude"))
            continue
        # 3. A stack of E experts: A (E*R, in) -> (E, R, in), B (out, R*E) -> (E, out, R). With gate and up in one
        # stack,    each expert's B (2F, R) is split into gate's and up's (F, R).
        stack = _fused_stack(fused, module != fused, factors, config, layout)
        named, projections = f"{fused}.{stack}", layout.stacks[stack]
        experts = (experts_of or {}).get(fused, range(architecture.num_experts))
        _check_rank(named, pair, config, len(experts))
        a_ERI, b_EOR = split_a(pair["A"], len(experts)), split_b(pair["B"], len(experts))
        for place, e in enumerate(experts):
            a_RI = a_ERI[place].contiguous()  # gate and up share it
            for projection, b_OR in zip(projections, b_EOR[place].chunk(len(projections)), strict=True):
                single = layout.name(fused, e, projection)
                if single in factors:
                    raise AdapterError(f"{named}: expert {e} is in the file twice, in the stack and by itself.")
                weights.keys[single] = pair_keys
                weights.pairs[single] = LoraPair(a_RI, b_OR.contiguous(), _alpha(named, config))
    return weights


def token_ids_in(config: dict[str, Any]) -> tuple[int, ...]:
    """Return the tokens whose rows are trained.

    Raises:
        AdapterError: If embeddings and output head have different ones.
    """
    given = config.get("trainable_token_indices") or {}
    by_module = given if isinstance(given, dict) else {"": given}
    found = {tuple(ids) for ids in by_module.values()}
    if len(found) > 1:
        raise AdapterError(
            f"{CONFIG_FILE}: trainable_token_indices differ between modules; lola_ft needs the same tokens in all."
        )
    return next(iter(found), ())


def grown_vocabulary(token_ids: Iterable[int], rows: int) -> int:
    """Return the number of embedding rows with these trained tokens.

    It is more than `rows` if the tokens include all ids from `rows` on, without a gap.
    """
    beyond = {token for token in token_ids if token >= rows}
    return rows + len(beyond) if beyond == set(range(rows, rows + len(beyond))) else rows


def _sort_factors(
    state: dict[str, Tensor], weights: AdapterWeights
) -> tuple[dict[str, dict[str, Tensor]], dict[tuple[str, str], str]]:
    """Sort factors by module and kind, with their keys, and put fully trained weights into `weights`.

    Raises:
        AdapterError: If tensors have no place in the base. The message names them.
    """
    architecture = weights.architecture
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    keys: dict[tuple[str, str], str] = {}
    unknown: list[str] = []
    incomplete: list[str] = []
    for key, tensor in sorted(state.items()):
        # Each tensor is a factor of LoRA, trained rows of an embedding, or a fully trained weight; else it is unknown.
        name = key.removeprefix(PREFIX)
        match = _LORA_KEY.match(name)
        if match:
            kind = match["factor"].removesuffix(".weight").removesuffix("_vector")
            if tensor.ndim == (1 if kind == "magnitude" else 2) and kind not in factors[match["module"]]:
                factors[match["module"]][kind] = tensor
                keys[match["module"], kind] = key
                continue
        elif rows := _TOKEN_ROWS.match(name):
            module = f"{architecture.family.on_disk(rows['module'])}.weight"
            if module in architecture.places and module in architecture.family.embeddings and tensor.ndim == 2:
                weights.token_rows[module], weights.keys[module] = tensor, (key,)
                continue
        else:
            plain = trained_name(name, architecture)
            if plain is not None and plain not in weights.trained:
                weights.trained[plain] = tensor
                weights.keys[plain] = (key,)
                continue
        unknown.append(key)
    # Pairs must have A and B. Only pairs outside the fused experts may have DoRA's lengths.
    for module, pair in factors.items():
        fused = _fused_module(module, architecture.family.experts)
        allowed = ({"A", "B"},) if fused else ({"A", "B"}, {"A", "B", "magnitude"})
        if set(pair) not in allowed:
            incomplete.append(f"{module} (holds only {', '.join(sorted(pair))})")
    if incomplete and not unknown:
        raise AdapterError(
            f"{len(incomplete)} modules lack a LoRA factor, or have DoRA's lengths where there can be none: "
            f"{', '.join(sorted(incomplete)[:3])}."
        )
    if unknown:
        tied = any(part in architecture.tied_modules for key in unknown for part in key.split("."))
        raise AdapterError(
            f"{len(unknown)} adapter tensors have no place in {architecture.family.title}: "
            f"{', '.join(sorted(unknown)[:3])}. "
            + f"{architecture.tied_reason} "
            * tied
            + f"lola_ft takes LoRA pairs of {', '.join(architecture.family.lora_groups)}, and fully trained norms, "
            "biases and routers."
        )
    return factors, keys


def to_state(
    weights: AdapterWeights, layout: str, experts_of: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a layout by their name in the file, bit-equal to the tensors that they were read from.

    Args:
        experts_of: The experts to stack, for layers where these are not all. A file of the layout `peft` must hold all,
            with zeros for the others, because stock PEFT has no selection of experts.
    """
    plain = [module for module, pair in weights.pairs.items() if pair.magnitude is None]
    if layout == "per_expert" and weights.dora and plain:
        raise AdapterError(
            f"This adapter uses DoRA on some modules and plain LoRA on others ({plain[0]}), which the layout "
            "per_expert cannot hold: the authors' code would want lengths for all of them. Keep it in the layout peft, "
            "or merge it."
        )
    family = weights.architecture.family
    trained = trained_state(weights, layout, experts_of or {})
    state = {f"{PREFIX}{name}": tensor for name, tensor in trained.items()}
    if weights.token_rows and layout == "per_expert":
        raise AdapterError(
            "This adapter has trained special tokens, which the layout per_expert cannot hold. Keep it in the layout "
            "peft, or merge it."
        )
    for name, rows in weights.token_rows.items():
        module = family.in_memory(name.removesuffix(".weight"))
        state[f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"] = rows
    # Pairs of single modules are written; in the layout `peft`, experts' pairs are collected by fused parameter.
    stacks: dict[tuple[str, str], dict[int, LoraPair]] = defaultdict(dict)
    for module, pair in weights.pairs.items():
        single = family.parse_expert(module)
        if single is None or layout == "per_expert":
            name = module if layout == "per_expert" else family.in_memory(module)
            state |= _pair_state(name, pair.a, pair.b)
            if pair.magnitude is not None:
                state[f"{PREFIX}{name}.lora_magnitude_vector"] = pair.magnitude
        elif family.experts:
            by_expert = stacks[single.module, family.experts.stack_of(single.projection)]
            if single.expert not in by_expert:
                by_expert[single.expert] = joined_pair(weights, single)
    if len({frozenset(m for m, s in stacks if s == stack) for _, stack in stacks}) > 1:
        raise AdapterError(
            "Some layers have LoRA on both projections of their experts, others on one, and only the layout per_expert "
            "can hold both."
        )
    for (module, stack), by_expert in stacks.items():
        wanted = (experts_of or {}).get(module, range(weights.architecture.num_experts))
        a_ERI, b_EOR = _stack(by_expert, wanted, f"{module}.{stack}")
        # PEFT nests wrappers: if both parameters have one, the first parameter's is inside the second's.
        assert family.experts is not None, "only experts are stacked"
        first, second = family.experts.stacks
        inner = stack == first and (module, second) in stacks
        state |= _pair_state(module + ".base_layer" * inner, join_a(a_ERI), join_b(b_EOR))
    return {key: tensor.contiguous() for key, tensor in sorted(state.items())}


def detect_layout(names: Iterable[str]) -> str:
    """Return `per_expert` if a tensor belongs to one numbered expert, else `peft`."""
    return "per_expert" if any(_NUMBERED_EXPERT.search(name) for name in names) else "peft"


def _pair_state(module: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}


def _stack(by_expert: dict[int, LoraPair], experts: Sequence[int], name: str) -> tuple[Tensor, Tensor]:
    """Stack factors to (E, R, in) and (E, out, R), with zeros for an expert without a pair."""
    some = next(iter(by_expert.values()))
    if {(pair.a.shape, pair.b.shape, pair.alpha) for pair in by_expert.values()} != {
        (some.a.shape, some.b.shape, some.alpha)
    }:
        raise AdapterError(f"{name}: its experts differ in rank or alpha, which only the layout per_expert can hold.")
    a = [by_expert[e].a if e in by_expert else torch.zeros_like(some.a) for e in experts]
    b = [by_expert[e].b if e in by_expert else torch.zeros_like(some.b) for e in experts]
    return torch.stack(a), torch.stack(b)


def _fused_module(module: str, layout: ExpertLayout | None) -> str | None:
    """Return the fused experts' module that a LoRA pair belongs to; None for any other module."""
    plain = module.removesuffix(".base_layer")
    return plain if layout and plain.endswith(f".{layout.module}") else None


def _fused_stack(
    module: str, inner: bool, factors: dict[str, dict[str, Tensor]], config: dict[str, Any], layout: ExpertLayout
) -> str:
    """Return the fused parameter of a pair, from the nesting of wrappers or, if there is one wrapper, from the config.

    Args:
        inner: True for the inner of two wrappers.
    """
    first, second = layout.stacks
    if inner:
        return first
    if f"{module}.base_layer" in factors:
        return second
    targets = {target.rpartition(".")[2] for target in config.get("target_parameters") or ()}
    if len(targets) != 1 or not targets <= set(layout.stacks):
        raise AdapterError(f"{module}: target_parameters {sorted(targets)} do not name its projection.")
    return targets.pop()


def _named_in_config(module: str, config: dict[str, Any]) -> str:
    """Return a module's name in the config; for LoRA on a router's bare weight, the weight's name."""
    weight = f"{module}.weight"
    targets = config.get("target_parameters") or ()
    return weight if any(weight.endswith(f".{target}") for target in targets) else module


def _check_rank(name: str, pair: dict[str, Tensor], config: dict[str, Any], num_experts: int) -> None:
    """Check that both factors have the config's rank, times the number of stacked experts."""
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
    """Return a module's own value, or the common one. As in PEFT, the first pattern that matches counts."""
    pattern = config.get(pattern_key) or {}
    first = next((end for end in pattern if re.match(rf"(?:.*\.)?(?:{end})$", name)), name)
    value = pattern.get(first, config.get(common_key))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AdapterError(f"{CONFIG_FILE} gives no {common_key} for {name}.")
    return value
