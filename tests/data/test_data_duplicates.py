"""Rows that say the same, among the training rows and across the line to validation."""

from collections import Counter

import pytest

from lola_ft.data import Example, LeakCheck, hold_out, is_validation, without_duplicates
from lola_ft.data.example import prompt_fields
from lola_ft.errors import DataError


def row(prompt: str, answer: str, where: str = "a:1", language: str = "sw") -> Example:
    return Example(prompt_fields(prompt), answer, language, where)


def chat(first: str, last: str = "b") -> Example:
    return Example(prompt_fields("q"), last, "sw", "c:1", ((prompt_fields("p"), first),))


def test_only_the_first_of_equal_rows_stays() -> None:
    text = Example(None, "one", "de", "t:1")
    given = [row("one", "two"), row("one", "two", "b:1", "yo"), row("one", "two "), row("onet", "wo"), text, text]
    dropped: Counter[str] = Counter()
    assert list(without_duplicates(given, dropped)) == [given[0], given[2], given[3], given[4]]
    assert dropped == {"yo": 1, "de": 1}


def test_a_conversation_is_compared_as_a_whole() -> None:
    given = [chat("a"), chat("b"), chat("a"), row("q", "b")]
    assert list(without_duplicates(given, Counter())) == [given[0], given[1], given[3]]
    sides = {is_validation(chat(f"answer {n}"), 0.5, seed=0) for n in range(20)}
    assert sides == {True, False}


TRAINING = [row("one", "two", "t:1"), row("three", "four", "t:2"), row("one", "2", "t:3"), row("one", "two", "t:4")]
VALIDATION = [row("zero", "null", "v:1"), row("one", "two", "v:2")]


def test_a_leak_is_refused_and_both_places_are_named() -> None:
    check = LeakCheck(VALIDATION, "error")
    with pytest.raises(DataError) as caught:
        list(check.checked(TRAINING))
    assert str(caught.value) == (
        "t:1: the same row as v:2, which is for validation (2 such rows in all). Set data.leakage to drop, which "
        "leaves them out of the training rows, or to allow, which keeps them."
    )


def test_a_leak_is_dropped_from_the_training_rows_when_asked() -> None:
    check = LeakCheck(VALIDATION, "drop")
    assert list(check.checked(TRAINING)) == TRAINING[1:3]
    assert check.as_dict() == {"action": "drop", "rows": 2, "prompts": 1}


def test_a_leak_may_be_allowed_and_is_counted() -> None:
    check = LeakCheck(VALIDATION, "allow")
    assert list(check.checked(TRAINING)) == TRAINING
    assert (check.rows, check.prompts) == (2, 1)


def test_the_other_direction_of_a_translation_leaks_too() -> None:
    there = Example(prompt_fields("Translate.", "maji"), "water", "en", "v:1", pair=("maji", "water"))
    back = Example(prompt_fields("Tafsiri.", "water"), "maji", "sw", "t:1", pair=("maji", "water"))
    other = Example(prompt_fields("Tafsiri.", "water"), "maji safi", "sw", "t:2", pair=("maji safi", "water"))
    same = Example(there.prompt, there.completion, "en", "t:3")  # the same row in another format
    check = LeakCheck([there], "error")
    with pytest.raises(DataError, match=r"^t:1: the same two sentences as v:1, which is for validation \(2 such rows"):
        list(check.checked([back, other, same]))
    assert list(LeakCheck([there], "drop").checked([back, other, same])) == [other]
    assert list(without_duplicates([there, back], Counter())) == [there, back]  # two things to learn


def test_without_a_leak_every_row_passes() -> None:
    check = LeakCheck(VALIDATION, "error")
    assert list(check.checked(TRAINING[1:3])) == TRAINING[1:3]
    texts = [Example(None, "one", "sw", "x:1"), Example(None, "two", "sw", "x:2")]
    empty = LeakCheck(texts[:1], "error")
    assert list(empty.checked(texts[1:])) == texts[1:]
    assert empty.as_dict() == {"action": "error", "rows": 0, "prompts": 0}


def test_a_share_never_leaks() -> None:
    rows = [row(f"question {n % 50}", "answer", f"r:{n}") for n in range(400)]
    held: list[Example] = []
    training = list(hold_out(rows, 0.3, 0, held))
    assert len(training) + len(held) == 400
    assert not {example.identity for example in training} & {example.identity for example in held}
