"""The LOLA model, native to today's transformers.

Its classes are imported when they are first used: they bring most of transformers, seconds and a hundred megabytes,
which reading checkpoints and merging do without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lola_ft.model.registration import register

if TYPE_CHECKING:
    from lola_ft.model.config import LolaConfig
    from lola_ft.model.modeling import LolaForCausalLM, LolaModel

__all__ = ["LolaConfig", "LolaForCausalLM", "LolaModel", "register"]

_HOMES = {"LolaConfig": "config", "LolaForCausalLM": "modeling", "LolaModel": "modeling"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lola_ft.model' has no attribute '{name}'")
    return getattr(import_module(f"lola_ft.model.{_HOMES[name]}"), name)
