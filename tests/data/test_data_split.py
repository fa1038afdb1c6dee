"""The validation split: decided by what a row says, whatever stands around it."""

import random

import pytest

from lola_ft.data import Example, Row, Source, hold_out, is_validation, to_example
from lola_ft.data.example import prompt_fields
from lola_ft.data.formats import composed
from lola_ft.errors import DataError
from tests.conftest import assert_says


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


def translated(number: int, one: str, other: str, **keys: str) -> Example:
    row = Row({"en": f"caf\u00e9 {number}", "sw": f"mkahawa {number}"}, f"pairs.jsonl:{number}")
    codes = {"source_language": one, "target_language": other}
    return to_example(
        row, Source("translation", "pairs.jsonl", fields={"source": one, "target": other}, **codes | keys)
    )


def test_both_directions_of_a_translation_fall_on_the_same_side() -> None:
    there = [translated(n, "en", "sw") for n in range(300)]
    back = [translated(n, "sw", "en", instruction="Tafsiri: {source}") for n in range(300)]
    assert {row.identity for row in there}.isdisjoint(row.identity for row in back)
    sides = [is_validation(row, 0.3, seed=0) for row in there]
    assert sides == [is_validation(row, 0.3, seed=0) for row in back]
    assert 60 < sum(sides) < 120
    training, validation = split_validation([*there, *ROWS[:50], *back], 0.3, seed=0)
    assert not {row.pair for row in training if row.pair} & {row.pair for row in validation}
    held_out = [n for n, held in enumerate(sides[:20]) if held]
    assert held_out == [0, 1, 3, 11, 13, 15, 17, 18, 19], "the same in every process"


def test_both_directions_stay_together_when_characters_are_composed() -> None:
    def spelt(first: str, second: str) -> Example:
        row = Row({"source": first, "target": second}, "pairs.jsonl:1")
        return composed(to_example(row, Source("translation", "x", source_language="en", target_language="sw")))

    apart, whole, between = "e\u0301", "\u00e9", "f"  # apart < between < whole: composing changes their order
    assert spelt(apart, between).pair == spelt(between, whole).pair == (between, whole)


def test_no_share_holds_out_nothing() -> None:
    assert split_validation(ROWS, 0.0, seed=0) == (ROWS, [])


def test_a_share_that_leaves_a_side_empty_is_an_error() -> None:
    with pytest.raises(DataError) as caught:
        split_validation(ROWS[:20], 0.001, seed=0)
    assert_says(str(caught.value), "data.validation 0.001 of 20 rows leaves no validation row. The smallest share")
    least = float(str(caught.value).partition("holds out one row is ")[2].partition(". ")[0])
    assert len(split_validation(ROWS[:20], least, seed=0)[1]) == 1
    with pytest.raises(DataError):
        split_validation(ROWS[:20], least * 0.9, seed=0)
    with pytest.raises(DataError) as caught:
        split_validation(ROWS[:20], 0.9999, seed=0)
    assert_says(str(caught.value), "leaves no training row. The largest share that leaves one row is")
    with pytest.raises(DataError, match="No share divides them"):
        split_validation(ROWS[:1] * 3, 0.0001, seed=0)
