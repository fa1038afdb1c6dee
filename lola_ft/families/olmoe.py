"""OLMoE (`olmoe`; arXiv 2409.02060): experts in every layer, top-8 by softmax, norms of queries and keys."""

from typing import Any

from lola_ft.families import decoder
from lola_ft.families.family import Family, Place, Routing, Sizes


def sizes(config: Any) -> Sizes:
    """Read an `OlmoeConfig`."""
    return decoder.sizes(
        config,
        moe_layers=tuple(range(config.num_hidden_layers)),
        num_experts=config.num_experts,
        expert_inner=config.intermediate_size,
        top_k=config.num_experts_per_tok,
    )


def places(config: Any) -> dict[str, Place]:
    """List every tensor."""
    d, size = config.hidden_size, decoder.head_size(config)
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= decoder.attention(prefix, config, layer, config.attention_bias, config.attention_bias)
        found |= decoder.query_key_norms(prefix, d, config.num_key_value_heads * size, layer)
        found |= decoder.router(f"{prefix}.mlp.gate", f"{prefix}.mlp.gate", config.num_experts, d, layer)
        found |= decoder.experts(prefix, decoder.EXPERTS, d, config.intermediate_size, config.num_experts, layer)
    return found


OLMOE = Family(
    model_type="olmoe",
    title="OLMoE",
    heads={"causal_lm": "transformers:OlmoeForCausalLM"},
    backbone="model",
    positions="rotary",
    packs=True,
    normed_queries=True,
    targets={"attention": decoder.ATTENTION_TARGETS, "router": ("mlp.gate",)},
    size_keys=(*decoder.SIZE_KEYS, "num_experts"),
    embeddings=decoder.EMBEDDINGS,
    sizes=sizes,
    places=places,
    experts=decoder.EXPERTS,
    routing=Routing(balance="pooled", gate="parameter"),
)
