"""Qwen3's mixtures of experts (`qwen3_moe`; arXiv 2505.09388): top-8 by softmax, norms per head of queries and keys."""

from typing import Any

from lola_ft.families import decoder
from lola_ft.families.mixture import ExpertKeys, every_nth, mixture_family
from lola_ft.families.place import Place

KEYS = ExpertKeys("num_experts", "moe_intermediate_size", "num_experts_per_tok")


def moe_layers(config: Any) -> tuple[int, ...]:
    """Return the indices of the layers with experts. The others have a dense MLP."""
    listed = config.mlp_only_layers or ()
    others = (layer for layer in range(config.num_hidden_layers) if layer not in listed)
    return every_nth(others, config.decoder_sparse_step) if config.num_experts > 0 else ()


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a checkpoint by Hub name."""
    size = decoder.head_size(config)
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= decoder.attention(prefix, config, layer, config.attention_bias, config.attention_bias)
        found |= decoder.query_key_norms(prefix, size, size, layer)
        found |= feed_forward(prefix, config, layer)
    return found


def feed_forward(prefix: str, config: Any, layer: int) -> dict[str, Place]:
    """List router and experts of a layer, or its dense MLP."""
    d = config.hidden_size
    if layer not in moe_layers(config):
        return decoder.dense_mlp(prefix, config, layer)
    gate = f"{prefix}.mlp.gate"
    found = decoder.router(gate, gate, config.num_experts, d, layer)
    inner = config.moe_intermediate_size
    return found | decoder.experts(prefix, decoder.EXPERTS, d, inner, config.num_experts, layer)


QWEN3_MOE = mixture_family(
    "qwen3_moe",
    "Qwen3 MoE",
    "Qwen3MoeForCausalLM",
    places,
    KEYS,
    moe_layers=moe_layers,
    dense_layers=True,
    normed_queries=True,
)
