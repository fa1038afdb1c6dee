"""Measures of routing: known values, limits, and what they must not depend on."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lola_ft.routing.measures import dead_experts, flip_rate, jensen_shannon, largest_share, load_entropy, shares

COUNTS = st.lists(st.integers(0, 1000), min_size=4, max_size=4).filter(any)


def test_measures_of_known_counts_are_exact() -> None:
    counts = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0]])
    assert load_entropy(counts).tolist() == pytest.approx([1.0, 0.0, 0.5], abs=1e-12)
    assert largest_share(counts).tolist() == [0.25, 1.0, 0.5]
    assert dead_experts(counts).sum(-1).tolist() == [0, 3, 2]
    assert shares(counts)[2].tolist() == [0.5, 0.5, 0.0, 0.0]


def test_jensen_shannon_of_known_shares_is_exact() -> None:
    """Between (1, 0) and (1/2, 1/2): H(3/4, 1/4) - H(1/2, 1/2) / 2 bits."""
    expected = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    assert jensen_shannon(torch.tensor([7, 0]), torch.tensor([3, 3])).item() == pytest.approx(expected, abs=1e-12)
    assert jensen_shannon(torch.tensor([7, 0]), torch.tensor([0, 3])).item() == pytest.approx(1.0, abs=1e-12)


@given(COUNTS, COUNTS, st.integers(1, 9))
def test_jensen_shannon_is_symmetric_and_of_shares(first: list[int], second: list[int], times: int) -> None:
    a, b = torch.tensor(first), torch.tensor(second)
    value = jensen_shannon(a, b)
    assert 0 <= value <= 1
    torch.testing.assert_close(value, jensen_shannon(b, a), atol=1e-12, rtol=0)
    torch.testing.assert_close(value, jensen_shannon(a * times, b), atol=1e-12, rtol=0)
    assert jensen_shannon(a, a * times).item() == pytest.approx(0, abs=1e-12)


def test_jensen_shannon_broadcasts_over_pairs() -> None:
    counts = torch.randint(0, 9, (5, 2, 4)) + 1
    pairs = jensen_shannon(counts[:, None], counts[None])
    assert pairs.shape == (5, 5, 2)
    assert pairs[1, 3, 0] == jensen_shannon(counts[1, 0], counts[3, 0])


def test_flip_rate_is_the_share_of_changed_choices() -> None:
    before = torch.tensor([[0, 1], [2, 1], [3, 1], [0, 0]], dtype=torch.uint8)
    after = torch.tensor([[0, 1], [1, 1], [3, 0], [1, 0]])
    assert flip_rate(before[..., None], after[..., None]).tolist() == [0.5, 0.25]
    with pytest.raises(ValueError, match="same tokens"):
        flip_rate(before[..., None], after[:2, ..., None])


def test_without_tokens_the_entropy_is_nan() -> None:
    assert load_entropy(torch.zeros(4)).isnan()
    assert load_entropy(torch.tensor([5])).item() == 1
