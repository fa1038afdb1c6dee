"""The settings that a stored adapter was made with, recovered from its tensors."""

from lola_ft.adapters.selection import Selection
from lola_ft.adapters.settings import AdapterSettings
from lola_ft.adapters.weights import AdapterWeights


def settings_of(weights: AdapterWeights) -> AdapterSettings:
    """Return the ranks, alphas and choices of an adapter. Dropout is not stored, so it is 0.

    An adapter of another tool may have different ranks within a group, or LoRA on only some modules. The group then has
    the largest rank and its alpha.
    """
    places = weights.architecture.places
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, pair in weights.pairs.items():
        group = places[f"{module}.weight"].group
        if pair.rank > ranks.get(group, 0):
            ranks[group], alphas[group] = pair.rank, pair.alpha
    tuned = {places[name].group for name in weights.trained if name.endswith(".weight")}
    first = next(iter(alphas.values()), AdapterSettings.alpha)
    return AdapterSettings(
        attention_rank=ranks.get("attention"),
        mlp_rank=ranks.get("mlp"),
        shared_rank=ranks.get("shared_experts"),
        expert_rank=ranks.get("experts"),
        router_rank=ranks.get("router"),
        # A recipe has no alpha of the router's own, so the router's is the common one.
        alpha=alphas.get("router", alphas.get("experts", first)),
        alphas=alphas,
        rslora=weights.rslora,
        dora=weights.dora,
        init="loftq" if weights.starts_at_rounding_error else "default",
        selection=_selection(weights) if "experts" in ranks else None,
        tune_router="router" in tuned,
        tune_norms="norms" in tuned,
        tune_biases=bool(weights.biases()),
    )


def _selection(weights: AdapterWeights) -> Selection | None:
    """Return the experts that have LoRA or trained biases, for each MoE layer; None if all have."""
    architecture = weights.architecture
    chosen: dict[int | None, set[int]] = {layer: set() for layer in architecture.sizes.moe_layers}
    for name in (*(f"{module}.weight" for module in weights.pairs), *weights.trained):
        place = architecture.places[name]
        if place.expert is not None:
            chosen[place.layer].add(place.expert)
    if all(len(ids) == architecture.num_experts for ids in chosen.values()):
        return None
    return tuple(tuple(sorted(ids)) for ids in chosen.values())
