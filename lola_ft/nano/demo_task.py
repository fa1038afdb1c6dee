"""The demo's task: given three names, say their language. Rows for fine-tuning and a held-out test, as JSONL files.

A name that several languages write alike (normalised) has no one answer and is left out, and so is English, whose names
many languages take over. Every other language gets the same number of rows, as far as it has names.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from lola_ft.nano.cldr import Term, language_name, normalise
from lola_ft.nano.corpus import Split

PROMPT = "Names: {names}\nLanguage:"
NAMES_PER_ROW = 3


@dataclass(frozen=True)
class Row:
    """One example; the completion starts with the space that separates it from the prompt."""

    prompt: str
    completion: str
    language: str


def build_rows(
    split: Split, train_per_language: int, test_per_language: int, seed: int = 0
) -> tuple[list[Row], list[Row]]:
    """Training rows from the split's training terms and test rows from its held-out ones, both shuffled.

    In training a name may occur in several rows, in other company; in the test it occurs once, so a language with few
    held-out names gets fewer test rows.
    """
    languages_of: defaultdict[str, set[str]] = defaultdict(set)
    for term in (*split.train, *split.held_out):
        languages_of[normalise(term.text)].add(term.language)
    train = _own_names(split.train, languages_of)
    test = _own_names(split.held_out, languages_of)
    return (
        _rows(train, train_per_language, random.Random(seed), names_again=True),
        _rows(test, test_per_language, random.Random(seed), names_again=False),
    )


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _own_names(terms: Iterable[Term], languages_of: dict[str, set[str]]) -> dict[str, list[str]]:
    """The names that only one language has, by language; English left out."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for term in terms:
        if term.language != "en" and len(languages_of[normalise(term.text)]) == 1:
            names[term.language].append(term.text)
    return dict(sorted(names.items()))


def _rows(names: dict[str, list[str]], per_language: int, rng: random.Random, names_again: bool) -> list[Row]:
    """Up to `per_language` rows of each language, shuffled."""
    rows = []
    for language, own in names.items():
        triples = _triples(own, rng)
        while names_again and triples and len(triples) < per_language:
            triples += _triples(own, rng)
        rows += [
            Row(PROMPT.format(names=", ".join(triple)), " " + language_name(language), language)
            for triple in triples[:per_language]
        ]
    rng.shuffle(rows)
    return rows


def _triples(names: list[str], rng: random.Random) -> list[list[str]]:
    """Cut the names, shuffled, into groups of three; up to two are left over."""
    names = rng.sample(names, len(names))
    return [names[i : i + NAMES_PER_ROW] for i in range(0, len(names) - NAMES_PER_ROW + 1, NAMES_PER_ROW)]
