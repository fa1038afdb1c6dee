"""Hunyuan's mixtures (`hunyuan_v1_moe`; Hunyuan-A13B): a shared MLP beside the chosen experts, linear routers."""

from typing import Any

from lola_ft.errors import CheckpointError
from lola_ft.families import decoder
from lola_ft.families.family import Family, Place, Routing, Sizes

SHARED_TARGETS = ("shared_mlp.gate_proj", "shared_mlp.up_proj", "shared_mlp.down_proj")


def sizes(config: Any) -> Sizes:
    """Read a `HunYuanMoEV1Config`."""
    return decoder.sizes(
        config,
        moe_layers=tuple(range(config.num_hidden_layers)),
        num_experts=_same_in_every_layer(config.num_experts, "num_experts"),
        expert_inner=config.intermediate_size,
        top_k=_same_in_every_layer(config.moe_topk, "moe_topk"),
    )


def places(config: Any) -> dict[str, Place]:
    """List every tensor."""
    hidden, inner, size, biases = (
        config.hidden_size,
        config.intermediate_size,
        decoder.head_size(config),
        config.attention_bias,
    )
    num_experts = _same_in_every_layer(config.num_experts, "num_experts")
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        gate = f"{prefix}.mlp.gate.wg"
        found |= decoder.attention(prefix, config, layer, biases, biases)
        found |= decoder.norm(f"{prefix}.self_attn.query_layernorm", size, layer)
        found |= decoder.norm(f"{prefix}.self_attn.key_layernorm", size, layer)
        found |= decoder.router(gate, gate, num_experts, hidden, layer)
        found |= decoder.experts(prefix, decoder.EXPERTS, hidden, inner, num_experts, layer)
        found |= decoder.gated_mlp(f"{prefix}.mlp.shared_mlp", hidden, inner, "shared_experts", layer)
    return found


def _same_in_every_layer(value: int | list[int], key: str) -> int:
    """The number; configs may have one for each layer.

    Raises:
        CheckpointError: If they differ.
    """
    values = {value} if isinstance(value, int) else set(value)
    if len(values) != 1:
        raise CheckpointError(f"config.json: {key} differs between layers ({sorted(values)}), which is not supported.")
    return values.pop()


HUNYUAN_V1_MOE = Family(
    model_type="hunyuan_v1_moe",
    title="Hunyuan MoE",
    heads={"causal_lm": "transformers:HunYuanMoEV1ForCausalLM"},
    backbone="model",
    positions="rotary",
    packs=True,
    normed_queries=True,
    targets={
        "attention": decoder.ATTENTION_TARGETS,
        "shared_experts": SHARED_TARGETS,
        "router": ("mlp.gate.wg",),
    },
    size_keys=(*decoder.SIZE_KEYS, "num_experts", "moe_topk"),
    embeddings=decoder.EMBEDDINGS,
    sizes=sizes,
    places=places,
    experts=decoder.EXPERTS,
    routing=Routing(balance=None, gate="linear"),
)
