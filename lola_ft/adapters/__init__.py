"""Adapters: which weights get LoRA, and their layouts on disk."""

from lola_ft.adapters.attach import AdapterSettings, attach, lora_config
from lola_ft.adapters.load import load_adapter, save_adapter

__all__ = ["AdapterSettings", "attach", "load_adapter", "lora_config", "save_adapter"]
