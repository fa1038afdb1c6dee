"""Adapters: which weights get LoRA, and their layouts on disk.

What needs PEFT is imported when it is first used: reading an adapter's files does not, and a merge has little memory.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lola_ft.adapters.attaching import AdapterSettings, attach, lora_config
    from lola_ft.adapters.load import load_adapter, save_adapter

__all__ = ["AdapterSettings", "attach", "load_adapter", "lora_config", "save_adapter"]

_HOMES = {
    "AdapterSettings": "attaching",
    "attach": "attaching",
    "load_adapter": "load",
    "lora_config": "attaching",
    "save_adapter": "load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lola_ft.adapters' has no attribute '{name}'")
    return getattr(import_module(f"lola_ft.adapters.{_HOMES[name]}"), name)
