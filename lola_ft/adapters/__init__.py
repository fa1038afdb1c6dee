"""Adapters: which weights get LoRA, and their layouts on disk.

What needs PEFT is imported when it is first used: reading an adapter's files does not, and a merge has little memory.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lola_ft.adapters.combine import combine_adapters
    from lola_ft.adapters.load_save import fitting_layout, load_adapter, save_adapter
    from lola_ft.adapters.peft_model import add_adapter, attach
    from lola_ft.adapters.settings import AdapterSettings, lora_config

__all__ = [
    "AdapterSettings",
    "add_adapter",
    "attach",
    "combine_adapters",
    "fitting_layout",
    "load_adapter",
    "lora_config",
    "save_adapter",
]

_HOMES = {
    "AdapterSettings": "settings",
    "add_adapter": "peft_model",
    "attach": "peft_model",
    "combine_adapters": "combine",
    "fitting_layout": "load_save",
    "load_adapter": "load_save",
    "lora_config": "settings",
    "save_adapter": "load_save",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lola_ft.adapters' has no attribute '{name}'")
    return getattr(import_module(f"lola_ft.adapters.{_HOMES[name]}"), name)
