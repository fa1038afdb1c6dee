"""GLM-4.5 and later (`glm4_moe`; arXiv 2508.06471): DeepSeek-V3's experts behind grouped-query attention."""

from typing import Any

from lola_ft.families import decoder, deepseek
from lola_ft.families.place import Place


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a checkpoint by Hub name. Only the larger models have norms of queries and keys."""
    size = decoder.head_size(config)
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= decoder.attention(prefix, config, layer, config.attention_bias)
        if config.use_qk_norm:
            found |= decoder.query_key_norms(prefix, size, size, layer)
        found |= deepseek.feed_forward(prefix, config, layer)
    return found


GLM4_MOE = deepseek.deepseek_family(
    "glm4_moe",
    "GLM-4.5",
    "Glm4MoeForCausalLM",
    places,
    normed_queries=True,
    set_aside=deepseek.is_behind_the_last_layer,
)
