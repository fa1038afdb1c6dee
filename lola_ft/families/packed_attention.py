"""Attention of transformers' models over packed documents: each stretch of whole documents attends only to itself.

transformers gives attention over a packed row a mask of the whole row, so eight rows of 2,048 tokens would cost eight
times what they need. This way has a name of its own, which a model's config holds in place of "sdpa". It is the same
as "sdpa" where a forward pass is not given stretches (`model/packed.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lola_ft.model.packed import Stretch, attend_by_stretch, exceeds_window, stretches_of

IMPLEMENTATION = "lola_ft_stretches"


def use_stretches(config: Any) -> None:
    """Have a model with this config attend by stretches, if it uses "sdpa"."""
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


def attend_to_stretches(
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
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    out = attend_by_stretch(
        lambda q, k, v, mask: sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0], stretches, query, key, value
    )
    return out, None


AttentionInterface.register(IMPLEMENTATION, attend_to_stretches)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
