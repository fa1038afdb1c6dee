"""Registration of LOLA with transformers' Auto classes, which then load the native model without remote code.

This module imports nothing of transformers. The classes are registered when the Auto classes are imported, and the
model itself is imported at its first use.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

from lola_ft.after_import import run_after_import

_CLASSES = {
    "AutoModel": ("modeling", "LolaModel"),
    "AutoModelForCausalLM": ("modeling", "LolaForCausalLM"),
    "AutoModelForSequenceClassification": ("heads", "LolaForSequenceClassification"),
    "AutoModelForTokenClassification": ("heads", "LolaForTokenClassification"),
}


def register() -> None:
    """Make transformers' Auto classes load the native model for `lola_v1` (called by `import lola_ft`)."""
    run_after_import("transformers.models.auto.configuration_auto", _register_config)
    run_after_import("transformers.models.auto.modeling_auto", _register_stand_ins)


def _register_config(auto: ModuleType) -> None:
    from lola_ft.model.config import LolaConfig

    auto.AutoConfig.register(LolaConfig.model_type, LolaConfig, exist_ok=True)


def _register_stand_ins(auto: ModuleType) -> None:
    from lola_ft.model.config import LolaConfig

    for auto_class, home in _CLASSES.items():
        getattr(auto, auto_class).register(LolaConfig, _StandIn(LolaConfig, *home), exist_ok=True)


class _StandIn:
    """A stand-in for a model class in an Auto class's list, until the first use of the class."""

    def __init__(self, config_class: type, module: str, name: str) -> None:
        self.config_class = config_class  # the Auto classes compare it
        self._home = (module, name)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(_load(*self._home), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _load(*self._home)(*args, **kwargs)


def _load(module: str, name: str) -> Any:
    """Import a model class, and replace all stand-ins in the Auto classes by the classes themselves."""
    import transformers

    from lola_ft.model.config import LolaConfig

    for auto_class, home in _CLASSES.items():
        getattr(transformers, auto_class).register(LolaConfig, _class_at(*home), exist_ok=True)
    return _class_at(module, name)


def _class_at(module: str, name: str) -> Any:
    return getattr(import_module(f"lola_ft.model.{module}"), name)
