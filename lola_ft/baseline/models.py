"""transformers' dense models with LOLA's loss: labelled rows alone are scored, divided by a whole step's labels."""

from typing import Any

from torch import Tensor
from transformers import BloomForCausalLM, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lola_ft.kernels.loss import labelled_cross_entropy


class DenseModel:
    """What is added to a dense model's class; `transformer` and `lm_head` are its own.

    Attributes:
        base_id: The Hub id, "" for a folder.
        base_fingerprint: Of the weights.
        quantization: "nf4" or None.
    """

    transformer: Any
    lm_head: Any
    config: Any
    base_id: str
    base_fingerprint: str
    quantization: str | None = None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Predict the next tokens; with labels, give the loss as `LolaForCausalLM` does."""
        assert not output_router_logits, "a dense model has no routers"
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        if labels is None:
            return super().forward(**inputs, logits_to_keep=logits_to_keep, **kwargs)  # type: ignore[misc]
        self._check_packing(attention_mask, position_ids)
        x_BSD = self.transformer(**inputs).last_hidden_state
        loss = labelled_cross_entropy(x_BSD, self.lm_head.weight, labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=None if skip_logits else self.lm_head(x_BSD))

    def _check_packing(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Whether a batch's documents are kept apart; GPT-2's attention does it from position ids."""


class DenseGPT2(DenseModel, GPT2LMHeadModel):
    """GPT-2, mGPT and their kind."""


class DenseBloom(DenseModel, BloomForCausalLM):
    """BLOOM, whose positions are ALiBi's."""

    def _check_packing(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        packed = attention_mask is None and position_ids is not None and bool((position_ids[:, 1:] == 0).any())
        assert not packed, "BLOOM's attention cannot keep packed documents apart"


CLASSES: dict[str, type] = {"gpt2": DenseGPT2, "bloom": DenseBloom}
