"""Mixtures of experts among transformers' decoders of Llama's kind: what their descriptions share."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lola_ft.errors import CheckpointError
from lola_ft.families import decoder
from lola_ft.families.expert_layout import ExpertLayout
from lola_ft.families.family import Family, Routing, Sizes
from lola_ft.families.place import Place


@dataclass(frozen=True)
class ExpertKeys:
    """Keys of `config.json` that give the number of experts, the width inside one, and how many a token uses."""

    num_experts: str
    inner: str
    top_k: str


_ROUTING = Routing(balance="pooled", gate="parameter")
"""As most of these families route."""


def every_layer(config: Any) -> tuple[int, ...]:
    """Return the indices of all layers."""
    return tuple(range(config.num_hidden_layers))


def every_nth(layers: Iterable[int], interval: int) -> tuple[int, ...]:
    """Return those of the layers that are the last of `interval` ones, counted from the first layer of the model."""
    return tuple(layer for layer in layers if (layer + 1) % interval == 0)


def mixture_family(
    model_type: str,
    title: str,
    model: str,
    places: Callable[[Any], dict[str, Place]],
    keys: ExpertKeys,
    *,
    moe_layers: Callable[[Any], tuple[int, ...]] = every_layer,
    attention_targets: tuple[str, ...] = decoder.ATTENTION_TARGETS,
    dense_layers: bool = False,
    shared_targets: tuple[str, ...] = (),
    router: str = "mlp.gate",
    experts: ExpertLayout = decoder.EXPERTS,
    routing: Routing = _ROUTING,
    more_sizes: Callable[[Any], dict[str, Any]] = lambda _: {},
    size_keys: tuple[str, ...] = (),
    more_keys: Callable[[Sizes], dict[str, Any]] = lambda _: {},
    **own: Any,
) -> Family:
    """Describe a mixture of experts.

    Args:
        model: transformers' class.
        moe_layers: Return the indices of the layers with experts of a config.
        dense_layers: Whether there are layers without experts, which have an MLP.
        shared_targets: The projections of shared experts, if it has any.
        router: Ending of the router's name in memory.
        more_sizes: Return the fields of `Sizes` that differ from those of other decoders.
        size_keys: Keys that give sizes, beside those of every decoder and of the experts.
        more_keys: Return keys of a small config, beside those of every decoder and of the experts.
        own: Other fields of `Family`.
    """

    def sizes(config: Any) -> Sizes:
        of_experts = {
            "moe_layers": moe_layers(config),
            "num_experts": getattr(config, keys.num_experts),
            "expert_inner": getattr(config, keys.inner),
            "top_k": getattr(config, keys.top_k),
        }
        found = decoder.sizes(config, **of_experts | more_sizes(config))
        if found.moe_layers and not (isinstance(found.top_k, int) and 1 <= found.top_k <= found.num_experts):
            raise CheckpointError(
                f"config.json: {keys.top_k} is {found.top_k}, but a token can use 1 to {found.num_experts} experts "
                f"({keys.num_experts}). Use the config that belongs to the weights."
            )
        return found

    def config_keys(sizes: Sizes) -> dict[str, Any]:
        of_experts = {keys.num_experts: sizes.num_experts, keys.inner: sizes.expert_inner, keys.top_k: sizes.top_k}
        return decoder.config_keys(sizes) | of_experts | more_keys(sizes)

    dense_targets = decoder.MLP_TARGETS if dense_layers else ()
    targets = {
        "attention": attention_targets,
        "mlp": dense_targets,
        "shared_experts": shared_targets,
        "router": (router,),
    }
    return decoder.family(
        model_type,
        title,
        model,
        targets={group: endings for group, endings in targets.items() if endings},
        size_keys=tuple(dict.fromkeys((*decoder.SIZE_KEYS, keys.num_experts, keys.inner, *size_keys))),
        sizes=sizes,
        config_keys=config_keys,
        places=places,
        experts=experts,
        routing=routing,
        **own,
    )
