"""Language mixing: the formula, its limits, and which rows are chosen."""

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lola_ft.data import Encoded, Example, Mixed, MixSettings, Template, encode, mix
from lola_ft.data.mixing import plan


def examples_of(available: dict[str, int], **keys: Any) -> dict[str, int]:
    return {code: share.examples for code, share in plan(available, MixSettings(**keys)).items()}


def test_temperature_one_leaves_the_data_as_it_is() -> None:
    assert examples_of({"en": 1000, "sw": 10, "yo": 1}) == {"en": 1000, "sw": 10, "yo": 1}


def test_shares_follow_the_root_of_the_counts() -> None:
    """900 and 100 rows at T = 2 are 30 to 10: three quarters of an epoch of 1000, and one quarter."""
    shares = plan({"en": 900, "sw": 100}, MixSettings(temperature=2.0))
    assert {code: (share.planned, share.examples) for code, share in shares.items()} == {
        "en": (750.0, 750),
        "sw": (250.0, 250),
    }


def test_no_row_is_repeated_more_often_than_allowed_and_the_rest_goes_to_the_others() -> None:
    shares = plan({"en": 900, "de": 400, "sw": 4}, MixSettings(temperature=2.0, max_repeats=3))
    assert shares["sw"].planned == round(1304 * 2 / 52, 1)  # 50 wanted, 12 possible
    assert shares["sw"].examples == 12
    assert (shares["en"].examples, shares["de"].examples) == (775, 517)  # the other 1292 as 30 to 20


def test_a_cap_holds_for_every_language_and_shortens_the_epoch() -> None:
    assert examples_of({"en": 900, "de": 40, "sw": 4}, max_per_language=50) == {"en": 50, "de": 40, "sw": 4}
    assert examples_of({"en": 900, "sw": 30}, temperature=100.0, max_per_language=50) == {"en": 41, "sw": 39}


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(1, 100_000), min_size=1, max_size=8),
    temperature=st.floats(1, 50),
    cap=st.none() | st.integers(1, 5000),
    repeats=st.integers(1, 6),
)
def test_limits_hold_and_an_epoch_keeps_its_size(
    counts: list[int], temperature: float, cap: int | None, repeats: int
) -> None:
    available = {f"l{index}": count for index, count in enumerate(counts)}
    found = examples_of(available, temperature=temperature, max_per_language=cap, max_repeats=repeats)
    limits = {code: min(cap or math.inf, count * repeats) for code, count in available.items()}
    assert all(0 <= found[code] <= limits[code] for code in found)
    assert sum(found.values()) == sum(min(count, cap or math.inf) for count in counts)
    by_size = sorted(found, key=available.__getitem__)
    assert all(found[small] <= found[large] + 1 for small, large in pairwise(by_size))


def rows(language: str, count: int, start: int = 0) -> list[Example]:
    return [Example(None, f"{language} number {n}", language, f"{language}:{n}") for n in range(start, start + count)]


@pytest.fixture(scope="module")
def encoded_rows(tokenizer: Any) -> Any:
    template = Template.load("plain")
    return lambda examples: encode(examples, tokenizer, template, 100)


def chosen(mixed: Mixed, language: str) -> Counter[tuple[int, ...]]:
    return Counter(
        tuple(row["input_ids"]) for row, code in zip(mixed.dataset, mixed.languages, strict=True) if code == language
    )


def test_the_mix_holds_what_was_planned(encoded_rows: Any) -> None:
    encoded: Encoded = encoded_rows([*rows("en", 90), *rows("sw", 10)])
    mixed = mix(encoded, MixSettings(temperature=2.0), seed=0)
    english, swahili = chosen(mixed, "en"), chosen(mixed, "sw")
    assert (english.total(), swahili.total()) == (75, 25)
    assert set(english.values()) == {1}
    assert sorted(swahili.values()) == [2] * 5 + [3] * 5
    assert len(swahili) == 10
    for code, counter in (("en", english), ("sw", swahili)):
        assert mixed.shares[code].examples == counter.total()
        assert mixed.shares[code].tokens == sum(len(ids) * times for ids, times in counter.items())
    assert mixed.tokens == sum(len(row["input_ids"]) for row in mixed.dataset)
    assert mixed.changed
    mean = sum(map(len, swahili)) / 10
    assert mixed.as_dict()["sw"] == {
        "available": 10,
        "planned": 25.0,
        "examples": 25,
        "planned_tokens": round(25 * mean),
        "tokens": mixed.shares["sw"].tokens,
    }


def test_labels_stay_with_their_ids(encoded_rows: Any) -> None:
    mixed = mix(encoded_rows([*rows("en", 20), *rows("sw", 2)]), MixSettings(temperature=3.0), seed=0)
    assert all(row["labels"][1:] == row["input_ids"][1:] for row in mixed.dataset)


def test_an_unmixed_epoch_is_the_very_same_dataset(encoded_rows: Any) -> None:
    encoded = encoded_rows([*rows("en", 9), *rows("sw", 2)])
    mixed = mix(encoded, MixSettings(), seed=0)
    assert mixed.dataset is encoded.dataset
    assert not mixed.changed


def test_a_seed_always_chooses_the_same_and_another_others(encoded_rows: Any) -> None:
    encoded = encoded_rows([*rows("en", 90), *rows("sw", 10)])
    first, again, other = (mix(encoded, MixSettings(temperature=2.0), seed) for seed in (0, 0, 1))
    assert first.dataset["input_ids"] == again.dataset["input_ids"]
    assert chosen(first, "en") != chosen(other, "en")


def test_a_new_source_moves_no_row_of_the_others(encoded_rows: Any) -> None:
    """The rows taken of a language only grow or shrink; the order of the sources does not matter."""
    before = mix(encoded_rows([*rows("en", 200), *rows("sw", 20)]), MixSettings(temperature=2.0), seed=0)
    after = mix(
        encoded_rows([*rows("yo", 90), *rows("sw", 20), *rows("en", 200)]), MixSettings(temperature=2.0), seed=0
    )
    for language in ("en", "sw"):
        old, new = chosen(before, language), chosen(after, language)
        assert old.total() != new.total()
        assert old <= new or new <= old
    longer = mix(encoded_rows([*rows("en", 200), *rows("en", 1, start=500), *rows("sw", 20)]), MixSettings(2.0), seed=0)
    assert sum((chosen(before, "en") - chosen(longer, "en")).values()) <= 2
