"""Making transformers' Auto classes give the native model, without importing it before it is used."""

from importlib import import_module
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from lola_ft.model.config import LolaConfig

_CLASSES: dict[Any, tuple[str, str]] = {
    AutoModel: ("modeling", "LolaModel"),
    AutoModelForCausalLM: ("modeling", "LolaForCausalLM"),
    AutoModelForSequenceClassification: ("heads", "LolaForSequenceClassification"),
    AutoModelForTokenClassification: ("heads", "LolaForTokenClassification"),
}


class _LazyClass:
    """Stands for a model class in an Auto class's list until something of it is wanted."""

    config_class = LolaConfig

    def __init__(self, module: str, name: str) -> None:
        self._home = (module, name)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(_load(*self._home), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _load(*self._home)(*args, **kwargs)


def register() -> None:
    """Make transformers' Auto classes give the native model for `lola_v1` (called by `import lola_ft`)."""
    AutoConfig.register(LolaConfig.model_type, LolaConfig, exist_ok=True)
    for auto_class, home in _CLASSES.items():
        auto_class.register(LolaConfig, _LazyClass(*home), exist_ok=True)


def register_classes() -> None:
    """Put the classes themselves in place of what stands for them."""
    for auto_class, home in _CLASSES.items():
        auto_class.register(LolaConfig, getattr(import_module(f"lola_ft.model.{home[0]}"), home[1]), exist_ok=True)


def _load(module: str, name: str) -> Any:
    register_classes()
    return getattr(import_module(f"lola_ft.model.{module}"), name)
