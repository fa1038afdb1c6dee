"""Numbers that say how tokens are spread over experts: pure functions of counts, shares and choices.

Shapes: E experts, last; whatever stands in front (languages, layers) is kept. A row without tokens gives NaN.
"""

import math

import torch
from torch import Tensor


def shares(counts: Tensor) -> Tensor:
    """Return each expert's share of the tokens (..., E), float64, of counts or weights by expert, none negative."""
    weights = counts.double()
    return weights / weights.sum(dim=-1, keepdim=True)


def load_entropy(counts: Tensor) -> Tensor:
    """Return how even the load is: its entropy over that of an even load, from counts or shares by expert (..., E).

    float64 (...): 0 where one expert gets every token, 1 where all get as many (and of a single expert).
    """
    load = shares(counts)
    entropy = torch.special.entr(load).sum(dim=-1)
    num_experts = counts.shape[-1]
    return entropy / math.log(num_experts) if num_experts > 1 else torch.ones_like(entropy)


def largest_share(counts: Tensor) -> Tensor:
    """The share of the expert that gets most (...), float64: from 1/E to 1."""
    return shares(counts).amax(dim=-1)


def dead_experts(counts: Tensor) -> Tensor:
    """Which experts got no token (..., E), bool."""
    return counts == 0


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of two distributions, in bits; its square root is a metric.

    Of counts or shares (..., E) that broadcast, float64 (...): 0 where they are equal, 1 where no expert is in both.
    """
    p, q = shares(first), shares(second)
    middle = (p + q) / 2
    entropy = torch.special.entr(torch.stack(torch.broadcast_tensors(middle, p, q))).sum(dim=-1)
    bits = (entropy[0] - (entropy[1] + entropy[2]) / 2) / math.log(2)
    return bits.clamp(min=0.0, max=1.0)  # rounding alone leaves the range


def flip_rate(before: Tensor, after: Tensor) -> Tensor:
    """The share of choices that are not made any more: with one choice per token, of tokens that go elsewhere.

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
