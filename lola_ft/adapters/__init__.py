"""Adapters: which weights get LoRA, and their layouts on disk."""

from lola_ft.adapters.attaching import add_adapter, attach
from lola_ft.adapters.load import load_adapter, save_adapter
from lola_ft.adapters.settings import AdapterSettings, lora_config

__all__ = ["AdapterSettings", "add_adapter", "attach", "load_adapter", "lora_config", "save_adapter"]
