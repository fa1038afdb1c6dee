"""Qwen3 (`qwen3`): a Llama that norms each head's queries and keys."""

from dataclasses import replace
from typing import Any

from lola_ft.families.llama import dense_family, dense_places
from lola_ft.families.place import Place


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a checkpoint by Hub name."""
    return dense_places(config, config.attention_bias, config.attention_bias, head_norms=True)


QWEN3 = replace(dense_family("qwen3", "Qwen3", "Qwen3ForCausalLM", places), normed_queries=True)
