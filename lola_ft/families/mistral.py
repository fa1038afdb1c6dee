"""Mistral (`mistral`): a Llama whose attention may be limited to a window."""

from lola_ft.families.llama import dense_family, dense_places

MISTRAL = dense_family("mistral", "Mistral", "MistralForCausalLM", dense_places)
