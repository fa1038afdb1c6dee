"""LOLA's place in transformers' Auto classes: they give the native model, without remote code.

Nothing of transformers is imported for it: the classes register once somebody imports the Auto classes, and the model
itself is imported when somebody first uses it.
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
    """Make transformers' Auto classes give the native model for `lola_v1` (called by `import lola_ft`)."""
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
    """Stands for a model class in an Auto class's list until somebody uses something of it."""

    def __init__(self, config_class: type, module: str, name: str) -> None:
        self.config_class = config_class  # the Auto classes compare it
        self._home = (module, name)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(_load(*self._home), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _load(*self._home)(*args, **kwargs)


def _load(module: str, name: str) -> Any:
    """Import a model class; from now on all Auto classes have the classes themselves."""
    import transformers

    from lola_ft.model.config import LolaConfig

    for auto_class, home in _CLASSES.items():
        getattr(transformers, auto_class).register(LolaConfig, _class_at(*home), exist_ok=True)
    return _class_at(module, name)


def _class_at(module: str, name: str) -> Any:
    return getattr(import_module(f"lola_ft.model.{module}"), name)
