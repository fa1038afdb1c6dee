"""transformers' own causal models with LOLA's loss, which scores only labelled rows and never holds all logits.

Shape suffixes: B batch, S sequence, D hidden.
"""

from functools import cache
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from lola_ft.errors import UserError
from lola_ft.families import architecture_of
from lola_ft.families.attention import stretch_inputs, use_our_attention
from lola_ft.families.balancing import balancing_loss
from lola_ft.families.routers import keeping_choices
from lola_ft.kernels.loss import head_of, labelled_cross_entropy
from lola_ft.model.router import real_tokens


class LabelledLoss:
    """Mixin for a causal model of transformers. `forward` takes the arguments of `LolaForCausalLM.forward`.

    Attributes:
        quantization: "nf4" or None.
    """

    config: Any
    lm_head: Any
    base_model_prefix: str
    quantization: str | None = None

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        use_our_attention(self.config)

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
        """Predict the next tokens; with labels, return the loss as `LolaForCausalLM` does."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        architecture = architecture_of(self.config)
        if architecture.family.routing:
            inputs["output_router_logits"] = output_router_logits
        else:
            assert not output_router_logits, "a dense model has no routers"
        if labels is None:
            return super().forward(**inputs, logits_to_keep=logits_to_keep, **kwargs)  # type: ignore[misc]
        self._check_packing(attention_mask, position_ids)
        if attention_mask is None and past_key_values is None and position_ids is not None:
            inputs |= stretch_inputs(self.config, position_ids)
        outputs = getattr(self, self.base_model_prefix)(**inputs)
        x_BSD = outputs.last_hidden_state
        if architecture.sizes.logit_divisor != 1:
            x_BSD = x_BSD / architecture.sizes.logit_divisor
        head_VD, trained = head_of(self.lm_head)
        loss = labelled_cross_entropy(x_BSD, head_VD, labels, num_items_in_batch, trained)
        logits = None if skip_logits else self.lm_head(x_BSD)
        if not output_router_logits:
            return CausalLMOutputWithPast(loss=loss, logits=logits)
        mask = real_tokens(attention_mask, x_BSD.shape[1])
        balances = architecture.family.balances
        aux_loss = balancing_loss(architecture, outputs.router_logits, mask) if balances else None
        return MoeCausalLMOutputWithPast(
            loss=loss, logits=logits, aux_loss=aux_loss, router_logits=outputs.router_logits
        )

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        """Enable checkpointing as transformers does, but let a recomputed layer keep its choices of experts."""
        if architecture_of(self.config).family.routing and "gradient_checkpointing_func" in kwargs:
            kwargs["gradient_checkpointing_func"] = keeping_choices(kwargs["gradient_checkpointing_func"])
        super()._set_gradient_checkpointing(enable, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, folder: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, each matrix in its family's orientation on disk.

        Raises:
            UserError: For 4-bit weights, which that layout cannot hold.
        """
        if self.quantization:
            raise UserError(
                "A 4-bit base is not saved as a checkpoint: its weights are rounded. Save the adapter "
                "(lola_ft.save_adapter), or merge it into the original weights (lola_ft.merge)."
            )
        state = kwargs.pop("state_dict", None) or self.state_dict()  # type: ignore[attr-defined]
        places = architecture_of(self.config).places
        turned = {
            name: tensor.t().contiguous() if name in places and places[name].transposed else tensor
            for name, tensor in state.items()
        }
        return super().save_pretrained(folder, *args, state_dict=turned, **kwargs)  # type: ignore[misc]

    def _check_packing(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Assert that packed documents are given only to attention that keeps them apart."""
        if architecture_of(self.config).family.packs:
            return
        packed = attention_mask is None and position_ids is not None and bool((position_ids[:, 1:] == 0).any())
        assert not packed, f"the attention of {self.config.model_type} models cannot keep packed documents apart"


@cache
def with_labelled_loss(model_class: type) -> type:
    """Return a class of transformers with this loss. It keeps its name, so that configs name transformers' class."""
    return type(model_class.__name__, (LabelledLoss, model_class), {"__module__": model_class.__module__})
