"""Granite's mixtures (`granitemoe`; IBM Granite 3.0): experts in every layer, top-k, then softmax; scaled residuals.

A file holds all experts of a layer in two tensors. Each expert's matrices get the names of other families' experts.
"""

from typing import Any

from lola_ft.families import decoder, mixtral
from lola_ft.families.expert_layout import ExpertLayout
from lola_ft.families.mixture import mixture_family
from lola_ft.families.place import Place

EXPERTS = ExpertLayout(
    "block_sparse_moe.experts",
    {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    fused={"gate_up_proj": "block_sparse_moe.input_linear", "down_proj": "block_sparse_moe.output_linear"},
)


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a checkpoint by Hub name, a layer's experts in the order of its two tensors in the file."""
    d, num_experts, biases = config.hidden_size, config.num_local_experts, config.attention_bias
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        router = f"{prefix}.block_sparse_moe.router"
        experts = decoder.experts(prefix, EXPERTS, d, config.intermediate_size, num_experts, layer)
        found |= decoder.attention(prefix, config, layer, biases, biases)
        found |= decoder.router(f"{router}.layer", router, num_experts, d, layer)
        found |= dict(sorted(experts.items(), key=lambda item: item[1].leaf == "down_proj"))
    return found


GRANITEMOE = mixture_family(
    "granitemoe",
    "Granite MoE",
    "GraniteMoeForCausalLM",
    places,
    mixtral.KEYS,
    router="block_sparse_moe.router",
    renamed={"block_sparse_moe.router.layer": "block_sparse_moe.router"},
    experts=EXPERTS,
    more_sizes=lambda config: {"logit_divisor": float(config.logits_scaling)},
    more_keys=lambda sizes: {"attention_multiplier": (sizes.hidden // sizes.heads) ** -0.5},
)
