"""lola_ft: parameter-efficient fine-tuning of LOLA, a multilingual mixture-of-experts model, and of other models.

Importing lola_ft makes `transformers.AutoModelForCausalLM` load LOLA checkpoints natively, without remote code. The
functions of lola_ft are imported when they are first used, because PEFT and bitsandbytes take seconds.
"""

from typing import TYPE_CHECKING

from lola_ft.lazy_attributes import lazy_attributes
from lola_ft.model import register

if TYPE_CHECKING:
    from lola_ft.adapters import load_adapter, save_adapter
    from lola_ft.merging import merge
    from lola_ft.quantization import load_base

register()

__all__ = ["load_adapter", "load_base", "merge", "save_adapter"]
__version__ = "0.5.0"

__getattr__ = lazy_attributes(__name__, adapters="load_adapter save_adapter", merging="merge", quantization="load_base")
