"""OLMoE (`olmoe`; arXiv 2409.02060): experts in every layer, top-8 by softmax, norms of queries and keys."""

from typing import Any

from lola_ft.families import decoder
from lola_ft.families.mixture import ExpertKeys, mixture_family
from lola_ft.families.place import Place


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a checkpoint by Hub name."""
    d, size = config.hidden_size, decoder.head_size(config)
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= decoder.attention(prefix, config, layer, config.attention_bias, config.attention_bias)
        found |= decoder.query_key_norms(prefix, d, config.num_key_value_heads * size, layer)
        found |= decoder.router(f"{prefix}.mlp.gate", f"{prefix}.mlp.gate", config.num_experts, d, layer)
        found |= decoder.experts(prefix, decoder.EXPERTS, d, config.intermediate_size, config.num_experts, layer)
    return found


OLMOE = mixture_family(
    "olmoe",
    "OLMoE",
    "OlmoeForCausalLM",
    places,
    ExpertKeys("num_experts", "intermediate_size", "num_experts_per_tok"),
    normed_queries=True,
)
