"""LOLA's router: top-1 by softmax, not renormalised, and its load-balancing loss.

Shape suffixes: T tokens, D hidden, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RouterGate(nn.Linear):
    """The router's projection (E, D), without bias. It scores in float32, whatever the dtype of weight and input.

    In half precision, two computations of the same token could choose different experts if two scores are close.
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(hidden_size, num_experts, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.weight.float())


@dataclass(frozen=True)
class Routing:
    """The chosen expert of each token.

    Attributes:
        logits_TE: Scores before softmax (T, E), float32.
        expert_ids_T: Chosen expert (T,), int64.
        probs_T: The chosen expert's softmax probability (T,), float32, which scales the expert's output.
    """

    logits_TE: Tensor
    expert_ids_T: Tensor
    probs_T: Tensor


def route(logits_TE: Tensor, expert_ids_T: Tensor | None = None) -> Routing:
    """Choose each token's expert (top-1, not renormalised; LOLA, arXiv 2409.11272).

    Args:
        logits_TE: The router's scores (T, E), float32.
        expert_ids_T: Earlier choices (T,) to keep, whatever the scores are now.
    """
    probs_TE = logits_TE.softmax(dim=-1)
    if expert_ids_T is None:
        expert_ids_T = probs_TE.argmax(dim=-1)
    probs_T = probs_TE.gather(1, expert_ids_T[:, None]).squeeze(1)
    return Routing(logits_TE, expert_ids_T, probs_T)


def load_balancing_loss(router_logits: Sequence[Tensor], token_mask_T: Tensor | None = None) -> Tensor:
    """Return LOLA's auxiliary loss: `E * sum_e f_e * P_e` per MoE layer, summed over the layers.

    f_e is the share of tokens sent to expert e, P_e its mean probability. The authors' code also counts padding; here
    only real tokens count. transformers and TRL compute another loss, which pools all layers.

    Args:
        router_logits: One (T, E) tensor per MoE layer.
        token_mask_T: True for real tokens (T,); by default all are real.

    Returns:
        A scalar, float32; 1 per layer if the load is even.
    """
    total = torch.zeros(())
    for logits_TE in router_logits:
        num_experts = logits_TE.shape[-1]
        probs_TE = logits_TE.float().softmax(dim=-1)
        chosen_TE = F.one_hot(probs_TE.argmax(dim=-1), num_experts).to(probs_TE.dtype)
        load_E, mean_prob_E = _mean(chosen_TE, token_mask_T), _mean(probs_TE, token_mask_T)
        total = total + num_experts * (load_E * mean_prob_E).sum()
    return total


def router_z_loss(router_logits: Sequence[Tensor], token_mask_T: Tensor | None = None) -> Tensor:
    """Return the mean square of the tokens' `logsumexp` of scores, summed over the layers (ST-MoE, arXiv 2202.08906).

    It keeps scores small, where softmax is exact in half precision. Arguments are those of `load_balancing_loss`.
    """
    total = torch.zeros(())
    for logits_TE in router_logits:
        total = total + _mean(logits_TE.float().logsumexp(dim=-1).square(), token_mask_T)
    return total


def real_tokens(attention_mask: Tensor | None, seq: int) -> Tensor | None:
    """Return the flat mask (T,) of the real tokens among the last `seq` positions; None if all tokens are real."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -seq:].reshape(-1).bool()


def _mean(values: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """Return the mean over the real tokens (first dimension); 0 if there are none."""
    if token_mask_T is None:
        return values.mean(dim=0)
    weight = token_mask_T.to(values.dtype).view(-1, *[1] * (values.ndim - 1))
    return (values * weight).sum(0) / token_mask_T.sum().clamp(min=1)
