"""DeepSeek's mixtures and similar ones: dense first layers, shared experts, routers with a correction term."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from lola_ft.families import decoder
from lola_ft.families.family import Family, Routing, Sizes
from lola_ft.families.mixture import ExpertKeys, mixture_family
from lola_ft.families.place import Place

SHARED_TARGETS = ("shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj")
LATENT_TARGETS = (
    *("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.q_b_proj"),
    *("self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.o_proj"),
)
CORRECTION = "e_score_correction_bias"
KEYS = ExpertKeys("n_routed_experts", "moe_intermediate_size", "num_experts_per_tok")


def moe_layers(config: Any) -> tuple[int, ...]:
    """Return the indices of the layers with experts: all but the first ones."""
    return tuple(range(config.first_k_dense_replace, config.num_hidden_layers))


def config_keys(sizes: Sizes, latent: bool) -> dict[str, Any]:
    """Return the keys of a small config, with one dense layer, one shared expert and one group of experts."""
    found: dict[str, Any] = {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    if not latent:
        return found
    size = sizes.hidden // sizes.heads
    ranks = {"q_lora_rank": sizes.hidden // 2, "kv_lora_rank": sizes.hidden // 4}
    widths = {"qk_nope_head_dim": size, "qk_rope_head_dim": size // 2, "head_dim": size // 2, "v_head_dim": size}
    return found | ranks | widths


def deepseek_family(
    model_type: str,
    title: str,
    model: str,
    places: Callable[[Any], dict[str, Place]],
    latent: bool = False,
    **own: Any,
) -> Family:
    """Return the family of a mixture with shared experts, and with dense layers before those with experts.

    Args:
        model: Name of transformers' class.
        latent: True for DeepSeek's latent attention, False for grouped-query attention.
        own: Other fields of `Family`.
    """
    if latent:
        own |= {"attention": "latent", "attention_targets": LATENT_TARGETS}
    return mixture_family(
        model_type,
        title,
        model,
        places,
        KEYS,
        moe_layers=moe_layers,
        dense_layers=True,
        shared_targets=SHARED_TARGETS,
        routing=Routing(balance=None, gate="parameter"),
        size_keys=("n_shared_experts",),
        more_keys=partial(config_keys, latent=latent),
        **own,
    )


def latent_attention(prefix: str, config: Any, layer: int) -> dict[str, Place]:
    """List multi-head latent attention (arXiv 2405.04434): keys, values and perhaps queries pass a narrow layer."""
    hidden, heads, biases = config.hidden_size, config.num_attention_heads, config.attention_bias
    turned, straight, value = config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim
    queries, latent, name = heads * (straight + turned), config.kv_lora_rank, f"{prefix}.self_attn"
    found = decoder.norm(f"{prefix}.input_layernorm", hidden, layer)
    if config.q_lora_rank is None:
        found |= decoder.linear(f"{name}.q_proj", hidden, queries, "attention", layer)
    else:
        found |= decoder.linear(f"{name}.q_a_proj", hidden, config.q_lora_rank, "attention", layer, biases)
        found |= decoder.norm(f"{name}.q_a_layernorm", config.q_lora_rank, layer)
        found |= decoder.linear(f"{name}.q_b_proj", config.q_lora_rank, queries, "attention", layer)
    found |= decoder.linear(f"{name}.kv_a_proj_with_mqa", hidden, latent + turned, "attention", layer, biases)
    found |= decoder.norm(f"{name}.kv_a_layernorm", latent, layer)
    found |= decoder.linear(f"{name}.kv_b_proj", latent, heads * (straight + value), "attention", layer)
    found |= decoder.linear(f"{name}.o_proj", heads * value, hidden, "attention", layer, biases)
    return found | decoder.norm(f"{prefix}.post_attention_layernorm", hidden, layer)


def feed_forward(
    prefix: str, config: Any, layer: int, corrected: bool = True, biases: bool = False
) -> dict[str, Place]:
    """List router, experts and shared experts of a layer, or its dense MLP."""
    if layer < config.first_k_dense_replace:
        return decoder.dense_mlp(prefix, config, layer, biases)
    hidden, inner, num_experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    gate = f"{prefix}.mlp.gate"
    found = decoder.router(gate, gate, num_experts, hidden, layer)
    if corrected:
        found |= decoder.correction(f"{gate}.{CORRECTION}", f"{gate}.{CORRECTION}", (num_experts,), layer)
    found |= decoder.experts(prefix, decoder.EXPERTS, hidden, inner, num_experts, layer)
    shared = inner * config.n_shared_experts
    return found | decoder.gated_mlp(f"{prefix}.mlp.shared_experts", hidden, shared, "shared_experts", layer, biases)


def is_behind_the_last_layer(name: str, config: Any) -> bool:
    """Return True if a tensor belongs to a layer that predicts further tokens. transformers leaves it out."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return match is not None and int(match[1]) >= config.num_hidden_layers
