"""Mixtral (`mixtral`; arXiv 2401.04088): experts in every layer, top-2 by softmax, renormalised.

Experts are named `block_sparse_moe.experts.N.w1`, `w3` and `w2` (gate, up, down) on disk, and `mlp.experts` in memory.
"""

from typing import Any

from lola_ft.families import decoder
from lola_ft.families.expert_layout import ExpertLayout
from lola_ft.families.mixture import ExpertKeys, mixture_family
from lola_ft.families.place import Place

KEYS = ExpertKeys("num_local_experts", "intermediate_size", "num_experts_per_tok")
EXPERTS = ExpertLayout(
    "mlp.experts", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}, on_disk="block_sparse_moe.experts"
)


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a checkpoint by Hub name."""
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= decoder.attention(prefix, config, layer)
        found |= feed_forward(prefix, config, layer)
    return found


def feed_forward(prefix: str, config: Any, layer: int) -> dict[str, Place]:
    """List router and experts of a layer."""
    d, num_experts = config.hidden_size, config.num_local_experts
    found = decoder.router(f"{prefix}.block_sparse_moe.gate", f"{prefix}.mlp.gate", num_experts, d, layer)
    return found | decoder.experts(prefix, EXPERTS, d, config.intermediate_size, num_experts, layer)


MIXTRAL = mixture_family(
    "mixtral",
    "Mixtral",
    "MixtralForCausalLM",
    places,
    KEYS,
    experts=EXPERTS,
    renamed={"block_sparse_moe.gate": "mlp.gate"},
)
