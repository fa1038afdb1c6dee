"""The LOLA model, native to today's transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from lola_ft.model.config import LolaConfig
from lola_ft.model.heads import LolaForSequenceClassification, LolaForTokenClassification
from lola_ft.model.layout import register_conversion
from lola_ft.model.modeling import LolaForCausalLM, LolaModel

__all__ = ["LolaConfig", "LolaForCausalLM", "LolaModel", "register"]


def register() -> None:
    """Make transformers' Auto classes give the native model for `lola_v1` (called by `import lola_ft`)."""
    AutoConfig.register(LolaConfig.model_type, LolaConfig, exist_ok=True)
    AutoModel.register(LolaConfig, LolaModel, exist_ok=True)
    AutoModelForCausalLM.register(LolaConfig, LolaForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(LolaConfig, LolaForSequenceClassification, exist_ok=True)
    AutoModelForTokenClassification.register(LolaConfig, LolaForTokenClassification, exist_ok=True)
    register_conversion()
