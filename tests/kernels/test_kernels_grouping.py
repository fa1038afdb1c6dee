"""The plan of the grouped buffer: each choice has its own row, among the rows of its expert."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lola_ft.kernels.grouping import group_by_expert, padded_rows

choices = st.integers(1, 20).flatmap(
    lambda experts: st.tuples(st.lists(st.integers(0, experts - 1), max_size=400), st.just(experts))
)


@given(choices)
@settings(deadline=None, max_examples=150)
def test_every_token_has_a_row_of_its_own_in_its_experts_span(case: tuple[list[int], int]) -> None:
    expert_ids, num_experts = case
    groups = group_by_expert(torch.tensor(expert_ids, dtype=torch.long), num_experts)
    rows = groups.row_of_choice_C.tolist()
    assert len(set(rows)) == len(rows) == len(expert_ids)
    span_of = {expert_id: (first, end) for expert_id, first, end in groups.spans()}
    for expert_id, row in zip(expert_ids, rows, strict=True):
        first, end = span_of[expert_id]
        assert first <= row < end


@given(choices)
@settings(deadline=None, max_examples=150)
def test_spans_tile_the_buffer_and_leave_out_idle_experts(case: tuple[list[int], int]) -> None:
    expert_ids, num_experts = case
    groups = group_by_expert(torch.tensor(expert_ids, dtype=torch.long), num_experts)
    assert [expert_id for expert_id, _, _ in groups.spans()] == sorted(set(expert_ids))
    at = 0
    for expert_id, first, end in groups.spans():
        assert first == at
        assert end - first == padded_rows(expert_ids.count(expert_id))
        at = end
    assert groups.num_rows == at if at <= 64 else (groups.num_rows - at in range(64) and groups.num_rows % 64 == 0)
    assert groups.expert_of_tile.tolist()[at:] == [num_experts] * (groups.num_rows - at)


@given(choices)
@settings(deadline=None, max_examples=50)
def test_tokens_of_an_expert_keep_their_order_from_its_first_row_on(case: tuple[list[int], int]) -> None:
    """So a buffer's rows depend only on the tokens, and a sum over them is the same in every run."""
    expert_ids, num_experts = case
    groups = group_by_expert(torch.tensor(expert_ids, dtype=torch.long), num_experts)
    for expert_id, first, _ in groups.spans():
        rows = [row for row, e in zip(groups.row_of_choice_C.tolist(), expert_ids, strict=True) if e == expert_id]
        assert rows == list(range(first, first + len(rows)))


@given(st.integers(0, 100_000))
def test_padding_is_little_and_monotonic(count: int) -> None:
    rows = padded_rows(count)
    assert count <= rows <= count + max(7, count // 4)
    assert rows % 8 == 0 or rows in (1, 2, 4)
    assert padded_rows(rows) == rows
    assert padded_rows(count + 1) >= rows


def test_few_row_counts_exist() -> None:
    """oneDNN builds a kernel per row count: three below eight rows, eight up to 64, then four per doubling."""
    assert {padded_rows(count) for count in range(1, 65)} == {1, 2, 4, *range(8, 65, 8)}
    assert len({padded_rows(count) for count in range(1, 16_385)}) == 3 + 8 + 4 * 8


@pytest.mark.parametrize(("count", "rows"), [(0, 0), (1, 1), (3, 4), (7, 8), (9, 16), (64, 64), (65, 80), (129, 160)])
def test_row_counts_are_padded_to_powers_of_two_or_buckets(count: int, rows: int) -> None:
    assert padded_rows(count) == rows
