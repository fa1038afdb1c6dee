"""CLDR's names, the split and the documents: the same every time, and nothing held out in what is trained on."""

import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

import lola_ft.nano
from lola_ft import cli
from lola_ft.families import LOLA
from lola_ft.nano.cldr import Term, join_names, load_terms, normalise
from lola_ft.nano.corpus import HELD_OUT_SHARE, Split, build_corpus, build_documents, load_split, split_terms
from lola_ft.nano.declaration import HELD_OUT_ARTICLES, find_declaration
from lola_ft.nano.sentences import sentences_of
from lola_ft.nano.settings import NanoSettings, nano_architecture

PASSES = {"passes": 1, "english_passes": 2, "seed": 0}


@pytest.fixture(scope="module")
def split() -> Split:
    return load_split()


def names_of(language: str) -> set[str]:
    return {term.text for term in load_terms() if term.language == language}


def test_help_and_start_page_name_the_size_and_the_languages_that_the_code_has() -> None:
    languages = f"{len({term.language for term in load_terms()})} languages"
    parameters = f"{nano_architecture(LOLA, NanoSettings()).total_parameters / 1e6:.1f} M parameters"
    page = " ".join((Path(__file__).parents[2] / "docs" / "index.md").read_text(encoding="utf-8").split())
    for text, says in (
        (cli.nano.__doc__, (languages, parameters)),
        (page, (languages, parameters)),
        (cli.routing_texts.__doc__, (languages,)),
        (lola_ft.nano.__doc__, (languages,)),
    ):
        assert text is not None
        assert all(number in " ".join(text.split()) for number in says), text


def test_every_language_has_enough_names() -> None:
    counts = Counter(term.language for term in load_terms())
    assert 130 <= len(counts) <= 160
    assert min(counts.values()) >= 400
    assert {"sw", "de", "ja", "hi", "am", "qu", "yo", "fr", "no"} <= counts.keys()
    assert not {"ht", "nn", "nb"} & counts.keys(), "these files are (nearly) French and Norwegian"


def test_names_are_the_languages_own() -> None:
    assert {"Januari", "Jumatatu", "Kiswahili", "Uhispania"} <= names_of("sw")
    assert {"январь", "января"} <= names_of("ru"), "months alone and in a date"
    # Babel's inherited tables name German months alone in Zhuang once that was read.
    assert not any(name.startswith("ndwen") for name in names_of("de"))


def test_no_junk_and_no_untranslated_english() -> None:
    english = {normalise(text) for text in names_of("en")}
    for term in load_terms():
        assert any(unicodedata.category(char)[0] == "L" for char in term.text), term
        assert not any(char.isdigit() for char in term.text), term
        assert unicodedata.is_normalized("NFC", term.text), term
        assert term.language == "en" or normalise(term.text) not in english, term


def test_lists_are_joined_as_the_language_does() -> None:
    assert join_names(["Kenya", "Uganda", "Tanzania"], "sw") == "Kenya, Uganda na Tanzania"
    assert join_names(["a", "b", "c", "d"], "en") == "a, b, c, and d"
    assert join_names(["甲", "乙", "丙"], "ja") == "甲、乙、丙"
    assert join_names(["uno", "due"], "it") == "uno e due"
    assert join_names(["solo"], "it") == "solo"


def test_split_is_stable_and_joins_what_reads_the_same() -> None:
    terms = [Term(text, language, "territory") for language in ("aa", "bb") for text in ("Peru", "PERU ", "Chad")]
    terms += [Term(f"name {'x' * i}", "aa", "unit") for i in range(50)]
    split = split_terms(terms, 0.5)
    assert split == split_terms(terms, 0.5)
    assert split.train
    assert split.held_out
    assert not {normalise(t.text) for t in split.train} & {normalise(t.text) for t in split.held_out}
    assert len(split.train) + len(split.held_out) == len(terms)


def test_a_term_inside_a_training_term_is_not_held_out() -> None:
    words = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(400)]
    terms = [Term(word, "aa", "unit") for word in words] + [Term(f"{word} end", "aa", "unit") for word in words]
    split = split_terms(terms, 0.5, keep_in_train=["wab"])
    trained = {normalise(term.text) for term in split.train} | {"wab"}
    assert len(split.held_out) > 100
    for term in split.held_out:
        assert not any(normalise(term.text) in text for text in trained), term


def test_adding_a_language_moves_no_other_term() -> None:
    some = [term for term in load_terms() if term.language in ("sw", "ja")]
    more = [*some, *(term for term in load_terms() if term.language == "ka")]
    before, after = split_terms(some, HELD_OUT_SHARE), split_terms(more, HELD_OUT_SHARE)
    assert set(before.held_out) == {t for t in after.held_out if t.language != "ka"}


def test_documents_are_the_same_every_time(split: Split) -> None:
    some = [term for term in split.train if term.language in ("en", "sw", "th")]
    documents = build_documents(some, **PASSES)
    assert documents == build_documents(some, **PASSES)
    assert documents != build_documents(some, **PASSES | {"seed": 1})
    assert sum("Uhispania" in document for document in documents) == 1
    assert sum(bool(re.search(r"\bSpain\b", document)) for document in documents) == 2


@pytest.mark.slow
def test_no_document_holds_a_held_out_term(split: Split) -> None:
    documents = [normalise(document) for document in build_documents(split.train, held_out=split.held_out, **PASSES)]
    text = "\n".join(documents)
    held_out = {normalise(term.text) for term in split.held_out}
    assert len(held_out) > 4000
    # Look at every place of the text once; a search for each of the terms would take minutes.
    by_start: dict[str, set[str]] = {}
    for term in held_out:
        by_start.setdefault(term[:2], set()).add(term)
    lengths = {start: sorted({len(term) for term in terms}) for start, terms in by_start.items()}
    for place in range(len(text)):
        start = text[place : place + 2]
        for length in lengths.get(start, ()):
            assert text[place : place + length] not in by_start[start], text[place : place + length]


def test_a_corpus_is_names_and_sentences_signed_with_their_language() -> None:
    swahili = find_declaration("sw")
    names = ["Kenya, Uganda", "Rwanda, Burundi"]

    def corpus(names_share: float = 1, seed: int = 0) -> list[str]:
        return build_corpus(names, [swahili], passes=2, names_share=names_share, seed=seed)

    documents = corpus()
    assert documents == corpus()
    assert documents != corpus(seed=1)
    assert all(documents.count(name) == 1 for name in names)
    assert sum(name in corpus(names_share=0.5) for name in names) == 1
    sentence = next(sentences_of(swahili.articles[0].paragraphs))
    assert documents.count(f"{sentence} — Swahili") == 2
    held_out = [paragraph for number in HELD_OUT_ARTICLES for paragraph in swahili.articles[number - 1].paragraphs]
    held_out_sentences = list(sentences_of(held_out))
    assert len(held_out_sentences) > 5
    assert not any(sentence in document for sentence in held_out_sentences for document in documents)
