"""Parts that the descriptions of Llama-like mixtures of experts share."""

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
    """Keys of `config.json` for the number of experts, the width inside an expert, and the experts per token."""

    num_experts: str
    inner: str
    top_k: str


_ROUTING = Routing(balance="pooled", gate="parameter")
"""The routing of most of these families."""


def every_layer(config: Any) -> tuple[int, ...]:
    """Return the indices of all layers."""
    return tuple(range(config.num_hidden_layers))


def every_nth(layers: Iterable[int], interval: int) -> tuple[int, ...]:
    """Return every `interval`-th of the layers, counted from the first layer of the model."""
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
    """Return the family of a mixture of experts.

    Args:
        model: Name of transformers' class.
        moe_layers: Function of a config that returns the indices of the layers with experts.
        dense_layers: True if there are layers without experts, with a dense MLP.
        shared_targets: The projections of shared experts, if there are any.
        router: Ending of the router's name in memory.
        more_sizes: Function of a config that returns the fields of `Sizes` that differ from other decoders'.
        size_keys: Config keys of sizes, in addition to those of every decoder and of the experts.
        more_keys: Function that returns keys of a small config, in addition to those of every decoder and the experts.
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
