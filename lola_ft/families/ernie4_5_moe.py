"""ERNIE 4.5's mixtures (`ernie4_5_moe`): softmax in float32 with a correction of the choice, shared experts."""

from typing import Any

from lola_ft.errors import CheckpointError
from lola_ft.families import decoder, deepseek
from lola_ft.families.family import Family, Place, Routing, Sizes


def is_moe_layer(config: Any, layer: int) -> bool:
    """Whether a layer has experts; the others have a dense MLP."""
    within = config.moe_layer_start_index <= layer <= config.moe_layer_end_index
    return within and (layer + 1) % config.moe_layer_interval == 0


def sizes(config: Any) -> Sizes:
    """Read an `Ernie4_5_MoeConfig`."""
    return decoder.sizes(
        config,
        moe_layers=tuple(layer for layer in range(config.num_hidden_layers) if is_moe_layer(config, layer)),
        num_experts=config.moe_num_experts,
        expert_inner=config.moe_intermediate_size,
        top_k=config.moe_k,
    )


def places(config: Any) -> dict[str, Place]:
    """List every tensor.

    Raises:
        CheckpointError: For a model with biases, of which there is none: its output head would have one, too.
    """
    if config.use_bias:
        raise CheckpointError("config.json: use_bias is true; ERNIE models with biases are not supported.")
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= decoder.attention(prefix, config, layer)
        if is_moe_layer(config, layer):
            found |= mixture(prefix, config, layer)
        else:
            found |= decoder.dense_mlp(prefix, config, layer)
    return found


def mixture(prefix: str, config: Any, layer: int) -> dict[str, Place]:
    """Router, experts and shared experts of a layer."""
    hidden, inner, num_experts = config.hidden_size, config.moe_intermediate_size, config.moe_num_experts
    gate, statics = f"{prefix}.mlp.gate", f"moe_statics.{deepseek.CORRECTION}"
    found = decoder.router(gate, gate, num_experts, hidden, layer, float32=True)
    found |= decoder.correction(f"{prefix}.mlp.{statics}", f"{gate}.{statics}", (1, num_experts), layer)
    found |= decoder.experts(prefix, decoder.EXPERTS, hidden, inner, num_experts, layer)
    if config.moe_num_shared_experts:
        shared = inner * config.moe_num_shared_experts
        found |= decoder.gated_mlp(f"{prefix}.mlp.shared_experts", hidden, shared, "shared_experts", layer)
    return found


ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    title="ERNIE 4.5 MoE",
    heads={"causal_lm": "transformers:Ernie4_5_MoeForCausalLM"},
    backbone="model",
    positions="rotary",
    packs=True,
    set_aside=lambda name, _: name.startswith("model.mtp_"),
    targets={
        "attention": decoder.ATTENTION_TARGETS,
        "mlp": decoder.MLP_TARGETS,
        "shared_experts": deepseek.SHARED_TARGETS,
        "router": ("mlp.gate",),
    },
    renamed={"mlp.moe_statics": "mlp.gate.moe_statics"},
    size_keys=(*decoder.SIZE_KEYS, "moe_num_experts", "moe_intermediate_size"),
    embeddings=decoder.EMBEDDINGS,
    sizes=sizes,
    places=places,
    experts=decoder.EXPERTS,
    routing=Routing(balance="pooled", gate="parameter"),
)
