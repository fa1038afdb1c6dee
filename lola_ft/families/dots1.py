"""dots.llm1 (`dots1`; arXiv 2506.05767): DeepSeek-V3's experts, norms of each head's queries and keys."""

from typing import Any

from lola_ft.families import decoder, deepseek
from lola_ft.families.place import Place


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a checkpoint by Hub name."""
    size, biases = decoder.head_size(config), config.attention_bias
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= decoder.attention(prefix, config, layer, biases, biases)
        found |= decoder.query_key_norms(prefix, size, size, layer)
        found |= deepseek.feed_forward(prefix, config, layer)
    return found


DOTS1 = deepseek.deepseek_family("dots1", "dots.llm1", "Dots1ForCausalLM", places, normed_queries=True)
