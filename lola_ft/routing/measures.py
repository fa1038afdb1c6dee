"""Measures of how tokens are spread over experts: pure functions of counts, shares and choices.

Shapes: E experts is the last dimension; leading dimensions (languages, layers) are kept. No tokens give NaN.
"""

import math

import torch
from torch import Tensor


def shares(counts: Tensor) -> Tensor:
    """Return each expert's share of the tokens (..., E), float64, from non-negative counts or weights by expert."""
    weights = counts.double()
    return weights / weights.sum(dim=-1, keepdim=True)


def load_entropy(counts: Tensor) -> Tensor:
    """Return the load's entropy divided by that of an even load, from counts or shares by expert (..., E).

    float64 (...): 0 if one expert gets every token, 1 if all get the same number (and for a single expert).
    """
    load = shares(counts)
    entropy = torch.special.entr(load).sum(dim=-1)
    num_experts = counts.shape[-1]
    return entropy / math.log(num_experts) if num_experts > 1 else torch.ones_like(entropy)


def largest_share(counts: Tensor) -> Tensor:
    """Return the share of the busiest expert (...), float64, from 1/E to 1."""
    return shares(counts).amax(dim=-1)


def dead_experts(counts: Tensor) -> Tensor:
    """Return a mask of the experts that got no token (..., E), bool."""
    return counts == 0


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of two distributions, in bits; its square root is a metric.

    From counts or shares (..., E) that broadcast; float64 (...): 0 if equal, 1 if no expert is in both.
    """
    p, q = shares(first), shares(second)
    middle = (p + q) / 2
    entropy = torch.special.entr(torch.stack(torch.broadcast_tensors(middle, p, q))).sum(dim=-1)
    bits = (entropy[0] - (entropy[1] + entropy[2]) / 2) / math.log(2)
    return bits.clamp(min=0.0, max=1.0)  # only rounding can leave the range


def flip_rate(before: Tensor, after: Tensor) -> Tensor:
    """Return the share of choices that are no longer made; with one choice per token, of tokens that changed expert.

    Args:
        before: Expert ids of tokens (T, ..., K), any integer dtype, K choices in any order.
        after: The same tokens' expert ids later, of the same shape.

    Returns:
        float64 (...), a mean over tokens and choices.
    """
    if before.shape != after.shape:
        raise ValueError(f"choices of {tuple(before.shape)} and {tuple(after.shape)} are not of the same tokens")
    kept = (before[..., :, None] == after[..., None, :]).any(dim=-1)
    return (~kept).double().mean(dim=(0, -1))
