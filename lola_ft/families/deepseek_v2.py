"""DeepSeek-V2 (`deepseek_v2`; arXiv 2405.04434): latent attention, shared experts, softmax over groups of experts."""

from typing import Any

from lola_ft.families import decoder, deepseek
from lola_ft.families.family import Family, Place, Routing


def places(config: Any) -> dict[str, Place]:
    """List every tensor."""
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= deepseek.latent_attention(prefix, config, layer)
        found |= deepseek.feed_forward(prefix, config, layer, corrected=False, biases=config.mlp_bias)
    return found


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    title="DeepSeek-V2",
    heads={"causal_lm": "transformers:DeepseekV2ForCausalLM"},
    backbone="model",
    positions="rotary",
    packs=True,
    attention="latent",
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
