"""The forms of experts with which the kernels are tested."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

_GATED = {"has_gate": True, "has_bias": False, "is_transposed": False, "activation": "silu"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "lola": {},
    "gated": _GATED,
    "gated with biases, in x out": _GATED | {"has_bias": True, "is_transposed": True},
    "plain, out x in, no biases": {"has_bias": False, "is_transposed": False, "activation": "relu2"},
}
"""Arguments of `FusedExperts`, by name of the layout."""


@dataclass(frozen=True)
class Form:
    """The choices per token, and the arguments of `FusedExperts` (by default LOLA's)."""

    top_k: int = 1
    settings: dict[str, Any] = field(default_factory=dict)


FORMS = {
    "lola": Form(),
    "lola, top 2": Form(2),
    "gated": Form(1, LAYOUTS["gated"]),
    "gated, top 3": Form(3, LAYOUTS["gated"]),
    "gated with biases, in x out, top 2": Form(2, LAYOUTS["gated with biases, in x out"]),
    "plain, out x in, no biases, top 2": Form(2, LAYOUTS["plain, out x in, no biases"]),
}
LOLA = FORMS["lola"]


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def form(request: pytest.FixtureRequest) -> Form:
    return request.param


def choices(expert_ids: list[int], top_k: int, num_experts: int) -> Tensor:
    """Return choices (T, K): each token's expert and the next ones, in an order that differs between tokens."""
    rows = [[(e + (k + t) % top_k) % num_experts for k in range(top_k)] for t, e in enumerate(expert_ids)]
    return torch.tensor(rows, dtype=torch.long).view(-1, top_k)
