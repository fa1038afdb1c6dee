"""The validation split: decided by what a row says, whatever stands around it."""

import random

import pytest

from lola_ft.data import Example, hold_out, is_validation
from lola_ft.data.example import prompt_fields
from lola_ft.errors import DataError


def split_validation(rows: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    validation: list[Example] = []
    return list(hold_out(rows, share, seed, validation)), validation


ROWS = [Example(prompt_fields(f"question {n}"), f"answer {n}", "sw", f"sw.jsonl:{n}") for n in range(2000)]


def test_the_share_is_met_and_order_kept() -> None:
    training, validation = split_validation(ROWS, 0.1, seed=0)
    assert 150 < len(validation) < 250
    assert sorted([*training, *validation], key=ROWS.index) == ROWS
    assert validation == [row for row in ROWS if is_validation(row, 0.1, seed=0)]


def test_order_and_other_rows_move_no_row() -> None:
    mixed = random.Random(0).sample(ROWS, 700)
    _, before = split_validation(ROWS, 0.1, seed=0)
    _, after = split_validation(mixed, 0.1, seed=0)
    assert after == [row for row in mixed if row in before]


def test_rows_that_say_the_same_fall_on_the_same_side() -> None:
    for row in ROWS[:200]:
        twin = Example(row.prompt, row.completion, "de", "elsewhere.jsonl:1")
        assert is_validation(twin, 0.5, seed=3) == is_validation(row, 0.5, seed=3)


def test_a_larger_share_keeps_what_a_smaller_one_held_out() -> None:
    _, small = split_validation(ROWS, 0.05, seed=0)
    _, large = split_validation(ROWS, 0.2, seed=0)
    assert set(map(id, small)) < set(map(id, large))


def test_another_seed_holds_out_other_rows() -> None:
    assert split_validation(ROWS, 0.1, seed=0) != split_validation(ROWS, 0.1, seed=1)


def test_the_choice_is_the_same_in_every_process_and_version() -> None:
    held_out = [n for n, row in enumerate(ROWS[:60]) if is_validation(row, 0.1, seed=0)]
    assert held_out == [3, 14, 23, 27, 37, 49, 52]


def test_prompt_and_answer_cannot_be_shifted_into_each_other() -> None:
    sides = {
        is_validation(Example({"prompt": text[:cut]}, text[cut:], "sw", "x"), 0.5, seed=0)
        for text in ("ab\ncd\n1\nef",)
        for cut in range(1, len(text))
    }
    assert sides == {True, False}


def test_no_share_holds_out_nothing() -> None:
    assert split_validation(ROWS, 0.0, seed=0) == (ROWS, [])


def test_a_share_that_leaves_a_side_empty_is_an_error() -> None:
    with pytest.raises(DataError) as caught:
        split_validation(ROWS[:2], 0.001, seed=0)
    assert str(caught.value) == (
        "data.validation 0.001 of 2 rows leaves no validation row. "
        "Change the share, or give validation sources of its own."
    )
