"""Llama (`llama`) and the dense decoders that are built like it: Mistral, Qwen2, Qwen3."""

from collections.abc import Callable
from typing import Any

from lola_ft.families import decoder
from lola_ft.families.family import Family
from lola_ft.families.place import Place


def dense_places(
    config: Any, biases: bool = False, output_bias: bool = False, mlp_bias: bool = False, head_norms: bool = False
) -> dict[str, Place]:
    """List every tensor of such a decoder.

    Args:
        biases: Queries, keys and values have biases; `output_bias`, `mlp_bias`: the others.
        head_norms: Each head's queries and keys are normed.
    """
    size = decoder.head_size(config)
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= decoder.attention(prefix, config, layer, biases, output_bias)
        if head_norms:
            found |= decoder.query_key_norms(prefix, size, size, layer)
        found |= decoder.dense_mlp(prefix, config, layer, mlp_bias)
    return found


def dense_family(model_type: str, title: str, model: str, places: Callable[[Any], dict[str, Place]]) -> Family:
    """Describe such a decoder.

    Args:
        model: transformers' class.
    """
    return decoder.family(
        model_type,
        title,
        model,
        targets={"attention": decoder.ATTENTION_TARGETS, "mlp": decoder.MLP_TARGETS},
        size_keys=decoder.SIZE_KEYS,
        sizes=decoder.sizes,
        config_keys=decoder.config_keys,
        places=places,
        ignored=decoder.OLD_BUFFERS,
    )


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a Llama; most have no biases."""
    return dense_places(config, config.attention_bias, config.attention_bias, config.mlp_bias)


LLAMA = dense_family("llama", "Llama", "LlamaForCausalLM", places)
