"""Llama (`llama`) and the dense decoders of the same structure: Mistral, Qwen2, Qwen3."""

from collections.abc import Callable
from typing import Any

from lola_ft.families import decoder
from lola_ft.families.family import Family
from lola_ft.families.place import Place


def dense_places(
    config: Any, biases: bool = False, output_bias: bool = False, mlp_bias: bool = False, head_norms: bool = False
) -> dict[str, Place]:
    """List every tensor of a checkpoint of a Llama-like dense decoder by Hub name.

    Args:
        biases: True if queries, keys and values have biases.
        output_bias: True if attention's output projection has one.
        mlp_bias: True if the MLP's projections have biases.
        head_norms: True if each head's queries and keys are normed.
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
    """Return the family of a Llama-like dense decoder.

    Args:
        model: Name of transformers' class.
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
    """List every tensor of a Llama checkpoint by Hub name. Most have no biases."""
    return dense_places(config, config.attention_bias, config.attention_bias, config.mlp_bias)


LLAMA = dense_family("llama", "Llama", "LlamaForCausalLM", places)
