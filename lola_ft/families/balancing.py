"""The load-balancing loss of a family's authors.

Shape suffixes: B batch, S sequence, T = B*S tokens, K choices per token, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lola_ft.families import Architecture
from lola_ft.model.router import load_balancing_loss


def balancing_loss(
    architecture: Architecture, router_logits: Sequence[Tensor], token_mask_T: Tensor | None = None
) -> Tensor:
    """Return the family's own load-balancing loss, not weighted.

    Args:
        router_logits: One (T, E) tensor per MoE layer.
        token_mask_T: True for real tokens (T,); by default all are real.

    Returns:
        A scalar, float32.
    """
    routing = architecture.family.routing
    assert routing is not None, "a dense family has no load to balance"
    assert routing.balance is not None, f"{architecture.family.title}'s authors have no load-balancing loss"
    if routing.balance == "layer_sum":
        return load_balancing_loss(router_logits, token_mask_T)
    return pooled_balancing_loss(router_logits, architecture.sizes.top_k, token_mask_T)


def pooled_balancing_loss(router_logits: Sequence[Tensor], top_k: int, token_mask_T: Tensor | None = None) -> Tensor:
    """Return `E * sum_e f_e * P_e` over the tokens of all layers together, as transformers' `load_balancing_loss_func`.

    f_e is the number of choices of expert e per token (Switch Transformers, arXiv 2101.03961, equations 4 to 6, with K
    choices), P_e its mean softmax probability. Padding does not count.

    Returns:
        A scalar, float32; K if the load is even.
    """
    num_experts = router_logits[0].shape[-1]
    counts_E = probs_E = torch.zeros(num_experts, device=router_logits[0].device)
    rows = torch.zeros((), device=router_logits[0].device)
    for logits_TE in router_logits:
        probs_TE = logits_TE.float().softmax(dim=-1)
        chosen_TE = torch.zeros_like(probs_TE).scatter_(1, probs_TE.topk(top_k, dim=-1).indices, 1.0)
        weight_T = probs_TE.new_ones(len(probs_TE)) if token_mask_T is None else token_mask_T.to(probs_TE.dtype)
        counts_E = counts_E + weight_T @ chosen_TE
        probs_E = probs_E + weight_T @ probs_TE
        rows = rows + weight_T.sum()
    rows = rows.clamp(min=1)
    return num_experts * (counts_E / rows * (probs_E / rows)).sum()
