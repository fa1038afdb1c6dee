"""The demo's rows: sentences of articles that nothing was trained on, more where two texts look alike."""

from collections import Counter
from dataclasses import replace

import pytest

from lola_ft.demo.language_task import build_rows, row_counts
from lola_ft.nano.cldr import normalise
from lola_ft.nano.declaration import Article, Declaration, find_declaration
from lola_ft.nano.sentences import MAX_BYTES, MIN_BYTES, sentences_of

TAGS = ("en", "sw", "sr", "sr-Latn", "bs", "th", "ja", "am")


@pytest.fixture(scope="module")
def declarations() -> dict[str, Declaration]:
    return {tag: find_declaration(tag) for tag in TAGS}


def sentence(prompt: str) -> str:
    return prompt.removesuffix(" —")


def test_rows_ask_for_the_languages_name_as_often_as_each_text_is_given(declarations: dict[str, Declaration]) -> None:
    train, test = build_rows(declarations, train_per_language=150, test_per_language=5)
    assert (train, test) == build_rows(declarations, train_per_language=150, test_per_language=5)
    assert Counter(row.language for row in train) == row_counts(declarations, 150)
    assert Counter(row.language for row in test) == dict.fromkeys(TAGS, 5)
    assert {row.completion for row in test if row.language.startswith("sr")} == {" Serbian"}
    assert all(row.prompt == f"{sentence(row.prompt)} —" for row in (*train, *test))


def test_texts_that_look_like_another_languages_have_more_rows(declarations: dict[str, Declaration]) -> None:
    counts = row_counts(declarations, 150)
    assert sum(counts.values()) == pytest.approx(150 * len(TAGS), rel=0.01)
    assert counts["bs"] == counts["sr-Latn"] > 1.5 * counts["am"], "Bosnian and Serbian in Latin, against Amharic"
    assert counts["sr"] < counts["sr-Latn"], "another script, and a text of the same language does not count"
    assert row_counts({"am": declarations["am"]}, 7) == {"am": 7}


def test_questions_are_of_held_out_articles_only(declarations: dict[str, Declaration]) -> None:
    train, test = build_rows(declarations, train_per_language=150, test_per_language=50)
    held_out = {tag: " ".join(" ".join(d.held_out_paragraphs).split()) for tag, d in declarations.items()}
    trained = {tag: normalise(" ".join(d.training_paragraphs)) for tag, d in declarations.items()}
    assert all(sentence(row.prompt) in held_out[row.language] for row in test)
    assert not any(normalise(sentence(row.prompt)) in trained[row.language] for row in test)
    assert not {row.prompt for row in train} & {row.prompt for row in test}


def test_a_sentence_that_is_trained_or_that_two_languages_share_is_not_asked() -> None:
    swahili = find_declaration("sw")
    known = "Kila mtu ana haki ya kuelimishwa bure katika madarasa ya chini na ya juu."
    trained = replace(
        swahili, articles=(Article("1", (known,)), *swahili.articles[1:25], *[Article("26", (known,))] * 5)
    )
    other = replace(trained, tag="zz", articles=(*swahili.articles[:25], *trained.articles[25:]))
    for declarations in ({"sw": trained}, {"sw": trained, "zz": other}):
        assert build_rows(declarations, 10, 10)[1] == []
    assert len(build_rows({"zz": other}, 10, 10)[1]) == 1


@pytest.mark.parametrize("tag", TAGS)
def test_sentences_are_one_or_two_lines_and_lose_no_mark(tag: str) -> None:
    paragraphs = find_declaration(tag).held_out_paragraphs
    found = list(sentences_of(paragraphs))
    whole = " ".join(" ".join(paragraphs).split())
    assert all(MIN_BYTES <= len(text.encode()) <= MAX_BYTES for text in found)
    assert all(text in whole for text in found)
    assert sum(map(len, found)) > 0.8 * len(whole)


def test_texts_are_divided_at_ends_of_sentences_or_words() -> None:
    text = "Everyone has the right to education. Education shall be free. It is so."
    expected = ["Everyone has the right to education.", "Education shall be free."]
    assert list(sentences_of([text], least=10, most=60)) == expected, "and what is too short is no question"
    assert list(sentences_of(["one two three four five six"], least=1, most=18)) == ["one two three", "four five six"]
    assert list(sentences_of(["กำ" * 6], least=1, most=18)) == ["กำ" * 3] * 2
