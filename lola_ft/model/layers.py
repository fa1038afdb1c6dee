"""The parts of a LOLA layer: attention, dense MLP, mixture of experts, and the block that joins them.

Shape suffixes: B batch, S sequence, D hidden, H heads, T = B*S tokens, E experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lola_ft.kernels.attention import cpu_attention, suits_cpu_attention
from lola_ft.model.config import LolaConfig
from lola_ft.model.experts import FusedExperts
from lola_ft.model.packed import Stretch, attend_by_stretch
from lola_ft.model.router import RouterGate, route


class LolaAttention(nn.Module):
    """Multi-head self-attention with a joint query-key-value projection, through transformers' attention interface."""

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
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.attention_dropout = config.attn_pdrop  # the name in transformers' layers

    def forward(
        self,
        x_BSD: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        stretches: list[Stretch] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output (B, S, D) and, with eager attention only, the attention weights (B, H, S, S).

        Args:
            stretches: Stretches of packed documents. Each attends only to itself.
        """
        # Joint projection (B, S, 3, H, head size), split into query, key and value (B, H, S, head size)
        batch, seq, _ = x_BSD.shape
        qkv = self.c_attn(x_BSD).view(batch, seq, 3, self.num_heads, self.head_dim)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        # Attention over the whole row, or over each stretch of packed documents: (B, S, H, head size)
        if stretches is None:
            out, weights = self._attend(query, key, value, attention_mask, **kwargs)
        else:
            out = attend_by_stretch(
                lambda q, k, v, mask: self._attend(q, k, v, mask, **kwargs)[0], stretches, query, key, value
            )
            weights = None
        out_BSD = self.c_proj(out.reshape(batch, seq, -1))
        return self.resid_dropout(out_BSD), weights

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output (B, S, H, head size) for query, key and value (B, H, S, head size)."""
        dropout = self.attention_dropout if self.training else 0.0
        implementation = self.config._attn_implementation
        if implementation == "sdpa" and suits_cpu_attention(query, key, value, mask, dropout):
            return cpu_attention(query, key, value, mask, self.scaling).transpose(1, 2), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        return attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)


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
    """Compute attention in plain tensor operations, and return its weights, too.

    Args:
        query, key, value: (B, H, S, head size).
        attention_mask: Added to the scores (B, H, S, S); None for none.

    Returns:
        The output (B, S, H, head size) and the weights (B, H, S, S).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.float().softmax(dim=-1).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class LolaMLP(nn.Module):
    """The dense feed-forward network of an even layer, `D -> F -> D`."""

    def __init__(self, config: LolaConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x_BSD), approximate="tanh")))


class LolaMoe(nn.Module):
    """The mixture of experts of an odd layer. `gate` is the router's projection, named as on disk."""

    def __init__(self, config: LolaConfig) -> None:
        super().__init__()
        self.gate = RouterGate(config.n_embd, config.num_experts)
        self.experts = FusedExperts(config.n_embd, config.n_inner, config.num_experts)
        # The authors drop out each expert's output before scaling it. Both are elementwise, so dropout after is equal.
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x_BSD: Tensor, choices: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the output (B, S, D) and the router's scores (T, E).

        Args:
            choices: An empty list is filled with the chosen experts. A filled list is used instead of choosing, so that
                a recomputation (gradient checkpointing) cannot choose other experts because of a rounding difference.
        """
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        routing = route(self.gate(x_TD), choices[0] if choices else None)
        if choices == []:
            choices.append(routing.expert_ids_T)
        out_TD = self.experts(x_TD, routing.expert_ids_T[:, None], routing.probs_T[:, None])
        return self.dropout(out_TD).view_as(x_BSD), routing.logits_TE


class LolaBlock(GradientCheckpointingLayer):
    """One pre-LayerNorm transformer layer. Odd layers have experts instead of the dense MLP."""

    def __init__(self, config: LolaConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = LolaAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.is_moe = config.is_moe_layer(layer_idx)
        if self.is_moe:
            self.moe = LolaMoe(config)
        else:
            self.mlp = LolaMLP(config)

    def forward(
        self,
        x_BSD: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        choices: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the hidden states (B, S, D), the router's scores (T, E) or None, the attention weights or None."""
        attn_BSD, weights = self.attn(self.ln_1(x_BSD), attention_mask, past_key_values, **kwargs)
        x_BSD = x_BSD + attn_BSD
        if self.is_moe:
            out_BSD, router_logits_TE = self.moe(self.ln_2(x_BSD), choices)
        else:
            out_BSD, router_logits_TE = self.mlp(self.ln_2(x_BSD)), None
        return x_BSD + out_BSD, router_logits_TE, weights


def init_weights(module: nn.Module, std: float) -> None:
    """Initialise one module as GPT-2 does: normal weights, zero biases, unit norms."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, FusedExperts):
        with torch.no_grad():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.zero_() if name.endswith("_bias") else parameter.normal_(std=std)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
