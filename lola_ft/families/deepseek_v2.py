"""DeepSeek-V2 (`deepseek_v2`; arXiv 2405.04434): latent attention, shared experts, softmax over groups of experts."""

from typing import Any

from lola_ft.families import decoder, deepseek
from lola_ft.families.place import Place


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a checkpoint by Hub name."""
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= deepseek.latent_attention(prefix, config, layer)
        found |= deepseek.feed_forward(prefix, config, layer, corrected=False, biases=config.mlp_bias)
    return found


DEEPSEEK_V2 = deepseek.deepseek_family("deepseek_v2", "DeepSeek-V2", "DeepseekV2ForCausalLM", places, latent=True)
