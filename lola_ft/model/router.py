"""LOLA's router: top-1 by softmax, not renormalised, and its load-balancing loss.

Shapes: T tokens, D hidden, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RouterGate(nn.Linear):
    """The router's bias-free projection (E, D). It scores in float32 whatever the dtype of weight and input.

    Half precision could swap two close experts between two computations of the same token; 16 scores cost nothing.
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
        probs_T: Its softmax probability over all experts (T,), float32; scales the expert's output.
    """

    logits_TE: Tensor
    expert_ids_T: Tensor
    probs_T: Tensor


def route(logits_TE: Tensor, expert_ids_T: Tensor | None = None) -> Routing:
    """Choose each token's expert (top-1, not renormalised; LOLA, arXiv 2409.11272).

    Args:
        expert_ids_T: Choices made before (T,), to be kept whatever the scores are now.
    """
    probs_TE = logits_TE.softmax(dim=-1)
    if expert_ids_T is None:
        expert_ids_T = probs_TE.argmax(dim=-1)
    probs_T = probs_TE.gather(1, expert_ids_T[:, None]).squeeze(1)
    return Routing(logits_TE, expert_ids_T, probs_T)


def load_balancing_loss(router_logits: Sequence[Tensor], token_mask_T: Tensor | None = None) -> Tensor:
    """LOLA's auxiliary loss: `E * sum_e f_e * P_e` a MoE layer, summed over the layers.

    f_e is the share of tokens sent to expert e, P_e its mean probability. The authors' code counts padding as
    tokens; here only real ones count. (transformers' and TRL's function of this purpose pools all layers.)

    Args:
        router_logits: One (T, E) tensor a MoE layer.
        token_mask_T: True for real tokens (T,); all are real if absent.

    Returns:
        A scalar, float32; 1 a layer if the load is even.
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
    """The mean square of each token's `logsumexp` of scores, summed over the layers (ST-MoE, arXiv 2202.08906).

    It keeps scores small, where softmax is exact in half precision. Arguments as for `load_balancing_loss`.
    """
    total = torch.zeros(())
    for logits_TE in router_logits:
        total = total + _mean(logits_TE.float().logsumexp(dim=-1).square(), token_mask_T)
    return total


def real_tokens(attention_mask: Tensor | None, seq: int) -> Tensor | None:
    """The flat mask (T,) of the real tokens among the last `seq` positions; None if every token is real."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -seq:].reshape(-1).bool()


def _mean(values: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """Mean over the real tokens, the first dimension; 0 if there are none."""
    if token_mask_T is None:
        return values.mean(dim=0)
    weight = token_mask_T.to(values.dtype).view(-1, *[1] * (values.ndim - 1))
    return (values * weight).sum(0) / token_mask_T.sum().clamp(min=1)
