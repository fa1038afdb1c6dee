"""Qwen1.5's and Qwen2's mixtures of experts (`qwen2_moe`): a shared expert, with a gate, beside the chosen ones."""

from typing import Any

from lola_ft.families import decoder
from lola_ft.families.family import Family, Place, Routing
from lola_ft.families.qwen3_moe import feed_forward, is_moe_layer, sizes

SHARED_TARGETS = ("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj")


def places(config: Any) -> dict[str, Place]:
    """List every tensor; the shared expert's gate (one output) stays as it is, so it is `other`."""
    d = config.hidden_size
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= decoder.attention(prefix, config, layer, config.qkv_bias)
        found |= feed_forward(prefix, config, layer)
        if is_moe_layer(config, layer):
            shared, inner = f"{prefix}.mlp.shared_expert", config.shared_expert_intermediate_size
            found |= decoder.gated_mlp(shared, d, inner, "shared_experts", layer)
            found |= decoder.linear(f"{prefix}.mlp.shared_expert_gate", d, 1, "other", layer)
    return found


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    title="Qwen2 MoE",
    heads={"causal_lm": "transformers:Qwen2MoeForCausalLM"},
    backbone="model",
    positions="rotary",
    packs=True,
    targets={
        "attention": decoder.ATTENTION_TARGETS,
        "mlp": decoder.MLP_TARGETS,
        "shared_experts": SHARED_TARGETS,
        "router": ("mlp.gate",),
    },
    size_keys=(*decoder.SIZE_KEYS, "num_experts", "moe_intermediate_size", "shared_expert_intermediate_size"),
    embeddings=decoder.EMBEDDINGS,
    sizes=sizes,
    places=places,
    experts=decoder.EXPERTS,
    routing=Routing(balance="pooled", gate="parameter"),
)
