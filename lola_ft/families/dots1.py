"""dots.llm1 (`dots1`; arXiv 2506.05767): DeepSeek-V3's experts, norms of each head's queries and keys."""

from typing import Any

from lola_ft.families import decoder, deepseek
from lola_ft.families.family import Family, Place, Routing


def places(config: Any) -> dict[str, Place]:
    """List every tensor."""
    size, biases = decoder.head_size(config), config.attention_bias
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= decoder.attention(prefix, config, layer, biases, biases)
        found |= decoder.query_key_norms(prefix, size, size, layer)
        found |= deepseek.feed_forward(prefix, config, layer)
    return found


DOTS1 = Family(
    model_type="dots1",
    title="dots.llm1",
    heads={"causal_lm": "transformers:Dots1ForCausalLM"},
    backbone="model",
    positions="rotary",
    packs=True,
    normed_queries=True,
    targets={
        "attention": decoder.ATTENTION_TARGETS,
        "mlp": decoder.MLP_TARGETS,
        "shared_experts": deepseek.SHARED_TARGETS,
        "router": ("mlp.gate",),
    },
    size_keys=deepseek.SIZE_KEYS,
    embeddings=decoder.EMBEDDINGS,
    sizes=deepseek.sizes,
    places=places,
    experts=decoder.EXPERTS,
    routing=Routing(balance=None, gate="parameter"),
)
