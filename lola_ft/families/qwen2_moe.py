"""Qwen1.5's and Qwen2's mixtures of experts (`qwen2_moe`): a shared expert with a gate besides the chosen experts."""

from typing import Any

from lola_ft.families import decoder
from lola_ft.families.mixture import mixture_family
from lola_ft.families.place import Place
from lola_ft.families.qwen3_moe import KEYS, feed_forward, moe_layers

SHARED_TARGETS = ("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj")


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a checkpoint by Hub name. The shared expert's gate (one output) is frozen: group `other`."""
    d = config.hidden_size
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= decoder.attention(prefix, config, layer, config.qkv_bias)
        found |= feed_forward(prefix, config, layer)
        if layer in moe_layers(config):
            shared, inner = f"{prefix}.mlp.shared_expert", config.shared_expert_intermediate_size
            found |= decoder.gated_mlp(shared, d, inner, "shared_experts", layer)
            found |= decoder.linear(f"{prefix}.mlp.shared_expert_gate", d, 1, "other", layer)
    return found


QWEN2_MOE = mixture_family(
    "qwen2_moe",
    "Qwen2 MoE",
    "Qwen2MoeForCausalLM",
    places,
    KEYS,
    moe_layers=moe_layers,
    dense_layers=True,
    shared_targets=SHARED_TARGETS,
    size_keys=("shared_expert_intermediate_size",),
    more_keys=lambda sizes: {"shared_expert_intermediate_size": sizes.expert_inner},
)
