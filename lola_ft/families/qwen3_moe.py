"""Qwen3's mixtures of experts (`qwen3_moe`; arXiv 2505.09388): top-8 by softmax, norms of queries and keys by head."""

from typing import Any

from lola_ft.families import decoder
from lola_ft.families.family import Family, Place, Routing, Sizes


def is_moe_layer(config: Any, layer: int) -> bool:
    """Whether a layer has experts; the others have a dense MLP."""
    listed = layer in (config.mlp_only_layers or ())
    return not listed and config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0


def sizes(config: Any) -> Sizes:
    """Read a `Qwen3MoeConfig`, or the config of Qwen2's mixtures."""
    return decoder.sizes(
        config,
        moe_layers=tuple(layer for layer in range(config.num_hidden_layers) if is_moe_layer(config, layer)),
        num_experts=config.num_experts,
        expert_inner=config.moe_intermediate_size,
        top_k=config.num_experts_per_tok,
    )


def places(config: Any) -> dict[str, Place]:
    """List every tensor."""
    size = decoder.head_size(config)
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= decoder.attention(prefix, config, layer, config.attention_bias, config.attention_bias)
        found |= decoder.query_key_norms(prefix, size, size, layer)
        found |= feed_forward(prefix, config, layer)
    return found


def feed_forward(prefix: str, config: Any, layer: int) -> dict[str, Place]:
    """Router and experts of a layer, or its dense MLP."""
    d = config.hidden_size
    if not is_moe_layer(config, layer):
        return decoder.gated_mlp(f"{prefix}.mlp", d, config.intermediate_size, "mlp", layer)
    gate = f"{prefix}.mlp.gate"
    found = decoder.router(gate, gate, config.num_experts, d, layer)
    inner = config.moe_intermediate_size
    return found | decoder.experts(prefix, decoder.EXPERTS, d, inner, config.num_experts, layer)


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    title="Qwen3 MoE",
    heads={"causal_lm": "transformers:Qwen3MoeForCausalLM"},
    backbone="model",
    positions="rotary",
    packs=True,
    normed_queries=True,
    targets={"attention": decoder.ATTENTION_TARGETS, "mlp": decoder.MLP_TARGETS, "router": ("mlp.gate",)},
    size_keys=(*decoder.SIZE_KEYS, "num_experts", "moe_intermediate_size"),
    embeddings=decoder.EMBEDDINGS,
    sizes=sizes,
    places=places,
    experts=decoder.EXPERTS,
    routing=Routing(balance="pooled", gate="parameter"),
)
