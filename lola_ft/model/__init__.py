"""The LOLA model for current transformers, without remote code.

Its classes are imported at their first use, because they import most of transformers: seconds and a hundred megabytes
that reading checkpoints and merging do not need.
"""

from typing import TYPE_CHECKING

from lola_ft.lazy_attributes import lazy_attributes
from lola_ft.model.registration import register

if TYPE_CHECKING:
    from lola_ft.model.config import LolaConfig
    from lola_ft.model.modeling import LolaForCausalLM, LolaModel

__all__ = ["LolaConfig", "LolaForCausalLM", "LolaModel", "register"]

__getattr__ = lazy_attributes(__name__, config="LolaConfig", modeling="LolaForCausalLM LolaModel")
