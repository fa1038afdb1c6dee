"""Attention of transformers' models as we train them, through transformers' attention interface.

It differs from "sdpa" in two places, and has a name of its own, which a model's config holds in place of "sdpa":

- Packed documents: transformers gives attention over a packed row a mask of the whole row, so eight rows of 2,048
  tokens would cost eight times what they need. Here each stretch of whole documents attends only to itself
  (`model/packed.py`), if a forward pass is given stretches.
- On a CPU in bfloat16 the backward pass is the faster one of `kernels/attention.py`, where that suits.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lola_ft.kernels.attention import cpu_attention, suits_cpu_attention
from lola_ft.kernels.precision import compute_dtype
from lola_ft.model.packed import Stretch, attend_by_stretch, exceeds_window, stretches_of

IMPLEMENTATION = "lola_ft_attention"


def use_our_attention(config: Any) -> None:
    """Have a model with this config attend as this file does, if it uses "sdpa"."""
    if config._attn_implementation == "sdpa":
        config._attn_implementation = IMPLEMENTATION


def stretches_for(config: Any, position_ids: Tensor) -> list[Stretch] | None:
    """Return the stretches of a row of packed documents; None if the model has to attend to the row as a whole.

    Args:
        position_ids: (B, S), starting from 0 at each document. The host reads it once.
    """
    if config._attn_implementation != IMPLEMENTATION:
        return None
    stretches = stretches_of(position_ids)
    if stretches and any(exceeds_window(config, stop - start) for start, stop, _ in stretches):
        return None
    return stretches


def stretch_inputs(config: Any, position_ids: Tensor) -> dict[str, Any]:
    """Return the inputs with which a model attends by stretches; none if it has to attend to the row as a whole.

    Args:
        position_ids: See `stretches_for`.
    """
    stretches = stretches_for(config, position_ids)
    if stretches is None:
        return {}
    # transformers passes a mask with four dimensions on, even an empty one, in place of building one of the whole row.
    mask = torch.empty(0, 0, 0, 0, dtype=torch.bool, device=position_ids.device)
    return {"attention_mask": mask, "stretches": stretches}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    stretches: list[Stretch] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention output (B, S, heads, head size) of each stretch, one after another.

    Args:
        query, key, value: (B, heads, S, head size); keys and values may have fewer heads.
        attention_mask: Used without stretches.
    """
    if stretches is None:
        return _attend_to_all(module, query, key, value, attention_mask, **kwargs), None
    out = attend_by_stretch(
        lambda q, k, v, mask: _attend_to_all(module, q, k, v, mask, **kwargs), stretches, query, key, value
    )
    return out, None


def _attend_to_all(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """Return the attention output (B, S, heads, head size)."""
    dtype = compute_dtype(query)  # autocast casts for PyTorch's attention, and does not know ours
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    plain = getattr(module, "is_causal", True) and not kwargs.keys() & {"is_causal", "position_bias", "cache"}
    if plain and suits_cpu_attention(query, key, value, mask, kwargs.get("dropout", 0.0)):
        groups = query.shape[1] // key.shape[1]  # query heads per head of keys and values
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return cpu_attention(query, repeat_kv(key, groups), repeat_kv(value, groups), mask, scale).transpose(1, 2)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
