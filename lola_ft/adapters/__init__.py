"""Adapters: the weights that get LoRA, and the adapters' layouts on disk.

Modules that need PEFT are imported at their first use. Reading an adapter's files does not need it, and a merge has
little memory.
"""

from typing import TYPE_CHECKING

from lola_ft.lazy_attributes import lazy_attributes

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

__getattr__ = lazy_attributes(
    __name__,
    combine="combine_adapters",
    load_save="fitting_layout load_adapter save_adapter",
    peft_model="add_adapter attach",
    settings="AdapterSettings lora_config",
)
