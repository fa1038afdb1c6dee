"""DeepSeek-V3 (`deepseek_v3`; arXiv 2412.19437): V2's layers, sigmoid scores with a correction of the choice."""

from typing import Any

from lola_ft.families import decoder, deepseek
from lola_ft.families.family import Family, Place, Routing


def places(config: Any) -> dict[str, Place]:
    """List every tensor."""
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= deepseek.latent_attention(prefix, config, layer)
        found |= deepseek.feed_forward(prefix, config, layer)
    return found


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    title="DeepSeek-V3",
    heads={"causal_lm": "transformers:DeepseekV3ForCausalLM"},
    backbone="model",
    positions="rotary",
    packs=True,
    attention="latent",
    set_aside=deepseek.is_behind_the_last_layer,
    targets={
        "attention": deepseek.LATENT_TARGETS,
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
