"""The LOLA model on today's transformers: backbone and language-model head.

Shape suffixes: B batch, S sequence, D hidden, V vocabulary, T = B*S tokens, E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple

from lola_ft.errors import UserError
from lola_ft.kernels.loss import head_of, labelled_cross_entropy
from lola_ft.model.config import LolaConfig
from lola_ft.model.conversion import IGNORED_KEYS, register_conversion
from lola_ft.model.layers import LolaBlock, init_weights
from lola_ft.model.packed import stretches_of
from lola_ft.model.router import load_balancing_loss, real_tokens


class LolaPreTrainedModel(PreTrainedModel):
    """Common base of the LOLA models: config, the features of transformers that they support, initialisation."""

    config_class = LolaConfig
    config: LolaConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LolaBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = list(IGNORED_KEYS)  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, but refuse `quantization_config`.

        Raises:
            UserError: If there is one: transformers' quantisers would leave every expert dense, without a message.
        """
        if kwargs.get("quantization_config") is not None:
            raise UserError(
                "transformers' quantisers do not support fused experts: they would quantise the router but no expert. "
                "Load in 4 bit with lola_ft.load_base(path, quantization='nf4')."
            )
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, in the Hub's layout.

        Raises:
            UserError: For 4-bit weights, which that layout cannot hold.
        """
        if getattr(self, "quantization", None):
            raise UserError(
                "A 4-bit base is not saved as a checkpoint: its weights are rounded. Save the adapter "
                "(lola_ft.save_adapter), or merge it into the original weights (lola_ft.merge)."
            )
        return super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config.initializer_range)


class LolaModel(LolaPreTrainedModel):
    """The backbone: embeddings, layers, final norm. Parameter names follow the Hub's `transformer.` tree."""

    def __init__(self, config: LolaConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([LolaBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Run the layers.

        Args:
            input_ids: (B, S); or `inputs_embeds` (B, S, D).
            attention_mask: (B, past + S), 1 for real tokens. Leave it out for packed rows.
            position_ids: (B, S); must restart at 0 with each document of a packed row.

        Returns:
            `last_hidden_state` (B, S, D) after the final norm; on request `hidden_states` (embeddings, each layer,
            the last one after the final norm), `router_logits` (one (T, E) per MoE layer), `attentions`.

        Raises:
            UserError: If the sequence is longer than the model's learned positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        checkpointing = self.gradient_checkpointing and self.training
        use_cache = use_cache and not checkpointing
        embeds_BSD = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        self._check_attention(embeds_BSD.device, output_attentions)
        may_be_packed = position_ids is not None and attention_mask is None and past_key_values is None
        position_ids = self._positions(embeds_BSD, past_key_values, position_ids)
        stretches = mask = None
        if may_be_packed and config._attn_implementation == "sdpa":
            stretches = stretches_of(position_ids)
        if stretches is None:
            mask = create_causal_mask(
                config=config,
                inputs_embeds=embeds_BSD,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        # After the mask: with a cache, even an empty one, the mask would let packed documents see each other.
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        x_BSD = self.drop(embeds_BSD + self.wpe(position_ids))

        hidden_states, router_logits, attentions = [x_BSD], [], []
        for block in self.h:
            x_BSD, logits_TE, weights = block(
                x_BSD,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                stretches=stretches,
                choices=[] if checkpointing else None,
                **kwargs,
            )
            hidden_states.append(x_BSD)
            attentions.append(weights)
            if logits_TE is not None:
                router_logits.append(logits_TE)
        x_BSD = self.ln_f(x_BSD)
        hidden_states[-1] = x_BSD
        return MoeModelOutputWithPast(
            last_hidden_state=x_BSD,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_logits=tuple(router_logits) if output_router_logits else None,
        )

    def _check_attention(self, device: torch.device, output_attentions: bool) -> None:
        """Check that the chosen attention can give what is asked for.

        Raises:
            UserError: If it would return no attention weights, or NaN.
        """
        chosen = self.config._attn_implementation
        if output_attentions and chosen != "eager":
            raise UserError(
                f"{chosen} attention does not compute attention weights. For output_attentions, call "
                "model.set_attn_implementation('eager') first."
            )
        if chosen == "flex_attention" and device.type == "cpu" and not torch._dynamo.config.disable:
            raise UserError(
                "flex attention, compiled for a CPU, returns NaN (torch 2.13). Call "
                "model.set_attn_implementation('sdpa') first, or use a GPU."
            )

    def _positions(self, embeds_BSD: Tensor, past_key_values: Cache | None, position_ids: Tensor | None) -> Tensor:
        """Return the given positions, or else those that follow the cache; (B or 1, S).

        Raises:
            UserError: If a position is beyond the learned ones.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        end = past + embeds_BSD.shape[1]
        if position_ids is not None and end > self.config.n_positions:
            # Packed or left-padded rows may be longer than their highest position. Reading it waits for the GPU.
            end = int(position_ids.max()) + 1
        if end > self.config.n_positions:
            raise UserError(
                f"The sequence is {end} tokens long, but this model has {self.config.n_positions} learned positions. "
                "Shorten the text or split it."
            )
        if position_ids is not None:
            return position_ids
        return torch.arange(past, end, device=embeds_BSD.device).unsqueeze(0)


class LolaForCausalLM(LolaPreTrainedModel, GenerationMixin):
    """LOLA with its language-model head, whose weight is the input embedding."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: LolaConfig) -> None:
        super().__init__(config)
        self.transformer = LolaModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Predict the next tokens.

        Args:
            labels: (B, S), shifted inside; -100 marks a position that is not learned.
            logits_to_keep: Score only this many last positions (0: all), or the positions given as a tensor.
            skip_logits: With labels, compute the loss only from labelled rows and return no logits, so that the
                (B, S, V) tensor never exists.
            num_items_in_batch: Divisor of the summed loss, instead of the number of labels of this batch.

        Returns:
            `loss` is only the cross-entropy. `aux_loss` (with `output_router_logits`) is LOLA's load-balancing loss of
            the real tokens, not weighted: a trainer adds `config.router_aux_loss_coef` times it.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        x_BSD = outputs.last_hidden_state
        loss, logits = None, None
        if labels is not None:
            head_VD, trained = head_of(self.lm_head)
            loss = labelled_cross_entropy(x_BSD, head_VD, labels, num_items_in_batch, trained)
        if labels is None or not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(x_BSD[:, kept])
        aux_loss = None
        if output_router_logits:
            aux_loss = load_balancing_loss(outputs.router_logits, real_tokens(attention_mask, x_BSD.shape[1]))
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


register_conversion()  # so that importing these classes is enough to load the Hub's layout
