"""Hunyuan's mixtures (`hunyuan_v1_moe`; Hunyuan-A13B): a shared MLP besides the chosen experts, linear routers."""

from typing import Any

from lola_ft.errors import CheckpointError
from lola_ft.families import decoder
from lola_ft.families.family import Routing
from lola_ft.families.mixture import ExpertKeys, mixture_family
from lola_ft.families.place import Place

SHARED_TARGETS = ("shared_mlp.gate_proj", "shared_mlp.up_proj", "shared_mlp.down_proj")


def sizes_of_experts(config: Any) -> dict[str, int]:
    """Read the number of experts and of experts per token. A config may give one number per layer."""
    return {
        "num_experts": _same_in_every_layer(config.num_experts, "num_experts"),
        "top_k": _same_in_every_layer(config.moe_topk, "moe_topk"),
    }


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a checkpoint by Hub name."""
    hidden, inner, size, biases = (
        config.hidden_size,
        config.intermediate_size,
        decoder.head_size(config),
        config.attention_bias,
    )
    num_experts = sizes_of_experts(config)["num_experts"]
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
    """Return a number that a config gives once or per layer.

    Raises:
        CheckpointError: If layers differ.
    """
    values = {value} if isinstance(value, int) else set(value)
    if len(values) != 1:
        raise CheckpointError(
            f"config.json: {key} differs between layers ({', '.join(map(str, sorted(values)))}), which is not "
            "supported. Choose a base with one number for all layers."
        )
    return values.pop()


HUNYUAN_V1_MOE = mixture_family(
    "hunyuan_v1_moe",
    "Hunyuan MoE",
    "HunYuanMoEV1ForCausalLM",
    places,
    ExpertKeys("num_experts", "intermediate_size", "moe_topk"),
    shared_targets=SHARED_TARGETS,
    router="mlp.gate.wg",
    routing=Routing(balance=None, gate="linear"),
    more_sizes=sizes_of_experts,
    size_keys=("moe_topk",),
    normed_queries=True,
)
