"""LOLA, a multilingual language model with sparse experts (arXiv 2409.11272), in plain PyTorch on transformers.

A decoder like GPT-2: learned positions, LayerNorm before each part, biases everywhere, output head tied to the input
embeddings. Every second layer, from the second on, has 16 experts instead of an MLP. Each expert is an MLP, and a
router sends each token to one of them:

    token embedding + position embedding
    for each layer:  x = x + attention(norm(x))
                     x = x + mlp(norm(x))        or, in odd layers, probability * expert(norm(x))
    norm, then the transposed token embeddings give the logits

Modules have the names of the checkpoint's tensors and hold them as stored: matrices of attention, MLP and experts are
(in, out), as in transformers' `Conv1D`. So this file loads the weights without any conversion.

It runs on transformers 4.41 to 5, was written by the lola_ft project, and is licensed under Apache-2.0.

Shape suffixes: B batch, S sequence, P tokens in the cache, D hidden, F inner, H heads, V vocabulary, T = B*S tokens, E
experts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.pytorch_utils import Conv1D

from .configuration_lola import LolaConfig

try:  # transformers 4.48 and later: attention by name, of transformers or of an engine such as vLLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError:
    ALL_ATTENTION_FUNCTIONS = {}


class LolaAttention(nn.Module):
    """Causal multi-head self-attention with a joint projection of queries, keys and values."""

    is_causal = True

    def __init__(self, config: LolaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        x_BSD: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output (B, S, D) and, with eager attention only, the weights (B, H, S, P + S)."""
        batch, seq, _ = x_BSD.shape
        qkv = self.c_attn(x_BSD).view(batch, seq, 3, self.num_heads, self.head_dim)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, S, head_dim) each
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS[name] if name in ALL_ATTENTION_FUNCTIONS else OWN_ATTENTION[name]
        dropout = self.config.attn_pdrop if self.training else 0.0
        out, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.resid_dropout(self.c_proj(out.reshape(batch, seq, -1))), weights


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention step by step, and return its weights (B, H, S, P + S), too."""
    scores = query @ key.transpose(-1, -2) * scaling  # (B, H, S, P + S)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.float().softmax(dim=-1).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention in one call of PyTorch, which never holds the scores of a whole row."""
    is_causal = attention_mask is None and query.shape[2] > 1
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, is_causal, scale=scaling)
    return out.transpose(1, 2), None


OWN_ATTENTION = {"eager": eager_attention, "sdpa": sdpa_attention}


def causal_mask(
    implementation: str, attention_mask: Tensor | None, seq: int, past: int, device: torch.device
) -> Tensor | None:
    """Return the mask of the tokens that each token sees: itself and earlier ones, without padding.

    Args:
        implementation: Name of the attention. Only `eager` and `sdpa` need a mask of all pairs; others build their own.
        attention_mask: (B, P + S), 1 for real tokens; None if all are real. A mask (B, 1, S, P + S) is not changed.

    Returns:
        (B or 1, 1, S, P + S) bool; None if attention needs no mask.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    if implementation not in OWN_ATTENTION:
        return attention_mask
    if attention_mask is None and implementation == "sdpa" and (past == 0 or seq == 1):
        return None
    place_S, place_P = torch.arange(past, past + seq, device=device), torch.arange(past + seq, device=device)
    mask = (place_P <= place_S[:, None])[None, None]
    if attention_mask is None:
        return mask
    mask = mask & attention_mask[:, None, None].bool()
    # Padding on the left would see no token, and softmax over nothing is NaN. So each token sees itself.
    return mask | (place_P == place_S[:, None]) & ~mask.any(dim=-1, keepdim=True)


class LolaMLP(nn.Module):
    """A feed-forward network D -> F -> D: the MLP of an even layer, or one expert."""

    def __init__(self, config: LolaConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.n_inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_inner)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class LolaExperts(nn.Module):
    """The experts of one layer, numbered from 0.

    This is not an `nn.ModuleList`, because vLLM takes a list of this name for gated SiLU experts and replaces them.
    """

    def __init__(self, config: LolaConfig) -> None:
        super().__init__()
        for expert_id in range(config.num_experts):
            self.add_module(str(expert_id), LolaMLP(config))

    def forward(self, x_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send each token through its experts and sum their outputs, weighted.

        Args:
            top_k_index: Experts of each token (T, 1).
            top_k_weights: Their weights (T, 1).
        """
        out_TD = torch.zeros_like(x_TD)
        for expert_id, expert in enumerate(self.children()):
            token_ids, choice = torch.where(top_k_index == expert_id)
            weights = top_k_weights[token_ids, choice, None]
            out_TD.index_add_(0, token_ids, (expert(x_TD[token_ids]) * weights).to(out_TD.dtype))
        return out_TD


class LolaGate(nn.Linear):
    """The router's scores of the experts, in float32 for any dtype of the model, so that rounding changes no choice."""

    def __init__(self, config: LolaConfig) -> None:
        super().__init__(config.n_embd, config.num_experts, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.weight.float())


class LolaMoe(nn.Module):
    """The mixture of experts of an odd layer: a router and its experts."""

    def __init__(self, config: LolaConfig) -> None:
        super().__init__()
        self.gate = LolaGate(config)
        self.experts = LolaExperts(config)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output (B, S, D) and the router's scores (T, E).

        Each token goes to the expert with the highest probability. The expert's output is multiplied by this
        probability, which is not normalised to 1 although there is only one expert.
        """
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        router_logits_TE = self.gate(x_TD)
        probs_T1, expert_ids_T1 = router_logits_TE.softmax(dim=-1).max(dim=-1, keepdim=True)
        return self.experts(x_TD, expert_ids_T1, probs_T1).view_as(x_BSD), router_logits_TE


class LolaBlock(nn.Module):
    """One layer: attention, then an MLP (even layers) or experts (odd layers)."""

    def __init__(self, config: LolaConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = LolaAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.is_moe = layer_idx % 2 == 1
        if self.is_moe:
            self.moe = LolaMoe(config)
        else:
            self.mlp = LolaMLP(config)

    def forward(
        self,
        x_BSD: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the hidden states (B, S, D), the router's scores (T, E) or None, the attention's weights or None."""
        attended_BSD, weights = self.attn(self.ln_1(x_BSD), attention_mask, past_key_values, **kwargs)
        x_BSD = x_BSD + attended_BSD
        if self.is_moe:
            out_BSD, router_logits_TE = self.moe(self.ln_2(x_BSD))
        else:
            out_BSD, router_logits_TE = self.mlp(self.ln_2(x_BSD)), None
        return x_BSD + out_BSD, router_logits_TE, weights


class LolaPreTrainedModel(PreTrainedModel):
    """Common base of backbone and language model: the features of transformers that they support, initialisation."""

    config_class = LolaConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LolaBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_cache_class = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_flash_attn = _supports_flash_attn_2 = bool(ALL_ATTENTION_FUNCTIONS)
    # Buffers of early versions of GPT-2, and a copy of the tied head.
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.bias$", r"\.attn\.masked_bias$", r"^lm_head\.weight$"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class LolaModel(LolaPreTrainedModel):
    """The backbone: embeddings, layers, final norm."""

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

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value

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
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast | tuple:
        """Run the layers.

        Args:
            input_ids: (B, S); or `inputs_embeds` (B, S, D).
            attention_mask: (B, P + S), 1 for real tokens.
            position_ids: (B, S); by default those after the cache.
            past_key_values: A `DynamicCache`.

        Returns:
            `last_hidden_state` (B, S, D) after the final norm; on request `hidden_states` (embeddings, then each layer,
            the last one after the final norm), `router_logits` (one (T, E) per layer with experts), `attentions`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_router_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError("Only eager attention forms its weights. Load with attn_implementation='eager'.")
        checkpointing = self.gradient_checkpointing and self.training
        use_cache = use_cache and not checkpointing
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()

        embeds_BSD = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        seq, device = embeds_BSD.shape[1], embeds_BSD.device
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            if past + seq > config.n_positions:
                raise ValueError(f"{past + seq} tokens are too many: this model has {config.n_positions} positions.")
            position_ids = torch.arange(past, past + seq, device=device)[None]
        mask = causal_mask(config._attn_implementation, attention_mask, seq, past, device)
        x_BSD = self.drop(embeds_BSD + self.wpe(position_ids))

        hidden_states, router_logits, attentions = [x_BSD], [], []
        for block in self.h:
            run = partial(block, position_ids=position_ids, **kwargs)
            if checkpointing:  # backward computes the layer again
                x_BSD, logits_TE, weights = self._gradient_checkpointing_func(run, x_BSD, mask)
            else:
                x_BSD, logits_TE, weights = run(x_BSD, mask, past_key_values)
            hidden_states.append(x_BSD)
            attentions.append(weights)
            if logits_TE is not None:
                router_logits.append(logits_TE)
        x_BSD = self.ln_f(x_BSD)
        hidden_states[-1] = x_BSD
        output = MoeModelOutputWithPast(
            last_hidden_state=x_BSD,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_logits=tuple(router_logits) if output_router_logits else None,
        )
        return output.to_tuple() if return_dict is False else output


class LolaForCausalLM(LolaPreTrainedModel, GenerationMixin):
    """LOLA with its language-model head, whose weight is the input embeddings."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: LolaConfig) -> None:
        super().__init__(config)
        self.transformer = LolaModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

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
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple:
        """Predict the next tokens.

        Args:
            labels: (B, S), shifted inside; -100 marks a position that is not learned.
            logits_to_keep: Score only this many last positions; 0 for all.
            num_items_in_batch: Divisor of the summed loss, instead of the number of labels.

        Returns:
            `loss` is only the cross-entropy. `aux_loss`, with `output_router_logits`, is LOLA's load-balancing loss of
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
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x_BSD[:, kept])
        loss = None
        if labels is not None:
            scores, expected = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
            if num_items_in_batch is None:
                loss = F.cross_entropy(scores, expected)
            else:
                loss = F.cross_entropy(scores, expected, reduction="sum") / num_items_in_batch
        aux_loss = None
        if output_router_logits:
            aux_loss = load_balancing_loss(outputs.router_logits, attention_mask, x_BSD.shape[1])
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the inputs of the next step of `generate`: the tokens that are not in the cache yet.

        Positions count only real tokens, so that a padded row continues like the same row without padding.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        inputs = {"past_key_values": past_key_values, "use_cache": use_cache, "attention_mask": attention_mask}
        if inputs_embeds is not None and past == 0:
            inputs["inputs_embeds"] = inputs_embeds
        else:
            inputs["input_ids"] = input_ids[:, past - input_ids.shape[1] :] if past else input_ids
        if attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, past:]
            if attention_mask.shape[1] > self.config.n_positions <= int(position_ids.max()):
                raise ValueError(f"This model has {self.config.n_positions} positions, and they are used up.")
            inputs["position_ids"] = position_ids
        for name in ("output_router_logits", "logits_to_keep"):
            if name in kwargs:
                inputs[name] = kwargs[name]
        return inputs


def load_balancing_loss(router_logits: tuple[Tensor, ...], attention_mask: Tensor | None, seq: int) -> Tensor:
    """Return LOLA's auxiliary loss: `E * sum_e load_e * prob_e` per layer with experts, summed over the layers.

    `load_e` is the share of real tokens that go to expert e, `prob_e` its mean probability.

    Args:
        router_logits: One (T, E) tensor per layer.
        attention_mask: (B, P + S), 1 for real tokens; None if all are real.

    Returns:
        A scalar; 1 per layer if the load is even.
    """
    total = torch.zeros((), device=router_logits[0].device)
    for logits_TE in router_logits:
        probs_TE = logits_TE.softmax(dim=-1)
        chosen_TE = F.one_hot(probs_TE.argmax(dim=-1), probs_TE.shape[-1]).to(probs_TE.dtype)
        if attention_mask is None:
            real_T = torch.ones_like(probs_TE[:, 0])
        else:
            real_T = attention_mask[:, -seq:].flatten().to(probs_TE.dtype)
        tokens = real_T.sum().clamp(min=1)
        load_E, prob_E = real_T @ chosen_TE / tokens, real_T @ probs_TE / tokens
        total = total + probs_TE.shape[-1] * (load_E * prob_E).sum()
    return total
