"""Qwen2 (`qwen2`, also Qwen1.5 and Qwen2.5): a Llama whose queries, keys and values have biases."""

from functools import partial

from lola_ft.families.llama import dense_family, dense_places

QWEN2 = dense_family("qwen2", "Qwen2", "Qwen2ForCausalLM", partial(dense_places, biases=True))
