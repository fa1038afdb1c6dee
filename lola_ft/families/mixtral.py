"""Mixtral (`mixtral`; arXiv 2401.04088): experts in every layer, top-2 by softmax, renormalised.

On disk the experts are `block_sparse_moe.experts.N.w1`, `w3` and `w2` (gate, up, down), in memory `mlp.experts`.
"""

from typing import Any

from lola_ft.families import decoder
from lola_ft.families.family import ExpertLayout, Family, Place, Routing, Sizes

EXPERTS = ExpertLayout(
    "mlp.experts", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}, on_disk="block_sparse_moe.experts"
)


def sizes(config: Any) -> Sizes:
    """Read a `MixtralConfig`."""
    return decoder.sizes(
        config,
        moe_layers=tuple(range(config.num_hidden_layers)),
        num_experts=config.num_local_experts,
        expert_inner=config.intermediate_size,
        top_k=config.num_experts_per_tok,
    )


def places(config: Any) -> dict[str, Place]:
    """List every tensor."""
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= decoder.attention(prefix, config, layer)
        found |= feed_forward(prefix, config, layer)
    return found


def feed_forward(prefix: str, config: Any, layer: int) -> dict[str, Place]:
    """Router and experts of a layer."""
    d, num_experts = config.hidden_size, config.num_local_experts
    found = decoder.router(f"{prefix}.block_sparse_moe.gate", f"{prefix}.mlp.gate", num_experts, d, layer)
    return found | decoder.experts(prefix, EXPERTS, d, config.intermediate_size, num_experts, layer)


MIXTRAL = Family(
    model_type="mixtral",
    title="Mixtral",
    heads={"causal_lm": "transformers:MixtralForCausalLM"},
    backbone="model",
    positions="rotary",
    packs=True,
    targets={"attention": decoder.ATTENTION_TARGETS, "router": ("mlp.gate",)},
    renamed={"block_sparse_moe.gate": "mlp.gate"},
    size_keys=(*decoder.SIZE_KEYS, "num_local_experts"),
    embeddings=decoder.EMBEDDINGS,
    sizes=sizes,
    places=places,
    experts=EXPERTS,
    routing=Routing(balance="pooled", gate="parameter"),
)
