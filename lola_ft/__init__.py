"""lola_ft: parameter-efficient fine-tuning of LOLA, a multilingual mixture-of-experts language model.

Importing it makes `transformers.AutoModelForCausalLM` load LOLA checkpoints natively, without remote code. The other
functions are imported when they are first used: PEFT and bitsandbytes take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lola_ft.model import register

if TYPE_CHECKING:
    from lola_ft.adapters import load_adapter, save_adapter
    from lola_ft.merging import merge
    from lola_ft.quantization import load_base

register()

__all__ = ["load_adapter", "load_base", "merge", "save_adapter"]
__version__ = "0.1.0"

_HOMES = {
    "load_adapter": "lola_ft.adapters",
    "load_base": "lola_ft.quantization",
    "merge": "lola_ft.merging",
    "save_adapter": "lola_ft.adapters",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lola_ft' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
