"""Heads for downstream tasks on the native backbone: one label per text, or one per token."""

from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from lola_ft.model.modeling import LolaPreTrainedModel


class LolaForSequenceClassification(GenericForSequenceClassification, LolaPreTrainedModel):
    """One label per text, predicted from the last real token (transformers' generic head, `score`)."""

    base_model_prefix = "transformer"


class LolaForTokenClassification(GenericForTokenClassification, LolaPreTrainedModel):
    """One label per token (transformers' generic head, `score` after dropout)."""

    base_model_prefix = "transformer"
