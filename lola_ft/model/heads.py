"""Heads for downstream tasks on the native backbone: a label for a text, or for each token."""

from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from lola_ft.model.modeling import LolaPreTrainedModel


class LolaForSequenceClassification(GenericForSequenceClassification, LolaPreTrainedModel):
    """A label a text, read off the last real token (transformers' generic head, `score`)."""

    base_model_prefix = "transformer"


class LolaForTokenClassification(GenericForTokenClassification, LolaPreTrainedModel):
    """A label a token (transformers' generic head, `score` after dropout)."""

    base_model_prefix = "transformer"
