"""MiniMax-M2 (`minimax_m2`): experts in every layer, sigmoid scores with a correction term for the choice.

Names on disk are Mixtral's, with the correction term next to the router.
"""

from typing import Any

from lola_ft.families import decoder, deepseek, mixtral
from lola_ft.families.mixture import mixture_family
from lola_ft.families.place import Place


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a checkpoint by Hub name."""
    size = decoder.head_size(config)
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= decoder.attention(prefix, config, layer)
        found |= decoder.query_key_norms(prefix, queries, keys, layer)
        found |= mixtral.feed_forward(prefix, config, layer)
        on_disk, in_memory = f"{prefix}.block_sparse_moe", f"{prefix}.mlp"
        shape = (config.num_local_experts,)
        found |= decoder.correction(
            f"{on_disk}.{deepseek.CORRECTION}", f"{in_memory}.{deepseek.CORRECTION}", shape, layer
        )
    return found


MINIMAX_M2 = mixture_family(
    "minimax_m2",
    "MiniMax-M2",
    "MiniMaxM2ForCausalLM",
    places,
    mixtral.KEYS,
    experts=mixtral.EXPERTS,
    renamed={"block_sparse_moe.gate": "mlp.gate", "block_sparse_moe": "mlp"},
    normed_queries=True,
    set_aside=deepseek.is_behind_the_last_layer,
)
