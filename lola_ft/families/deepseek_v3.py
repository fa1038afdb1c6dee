"""DeepSeek-V3 (`deepseek_v3`; arXiv 2412.19437): V2's layers, sigmoid scores with a correction term for the choice."""

from typing import Any

from lola_ft.families import decoder, deepseek
from lola_ft.families.place import Place


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a checkpoint by Hub name."""
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= deepseek.latent_attention(prefix, config, layer)
        found |= deepseek.feed_forward(prefix, config, layer)
    return found


DEEPSEEK_V3 = deepseek.deepseek_family(
    "deepseek_v3",
    "DeepSeek-V3",
    "DeepseekV3ForCausalLM",
    places,
    latent=True,
    set_aside=deepseek.is_behind_the_last_layer,
)
