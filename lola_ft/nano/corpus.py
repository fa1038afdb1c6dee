"""The nano base's pre-training text, and the text held out from it.

LOLA was pre-trained on plain documents of one language each. Here a document is a paragraph of the declaration of human
rights, or a list of names in one language, joined in that language's style with CLDR's patterns ("Kenya, Uganda na
Tanzania").
"""

import functools
import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from lola_ft.errors import DataError
from lola_ft.files import write_text
from lola_ft.nano.cldr import Term, join_names, language_name, load_terms, normalise
from lola_ft.nano.declaration import Declaration, load_declarations
from lola_ft.nano.sentences import sentences_of

HELD_OUT_SHARE = 0.06
KINDS = ("all", "names", "declaration")
"""Kinds of text for `lola-ft routing texts --text`."""
SHORTEST_LIST, LONGEST_LIST = 4, 24  # names in a document
SHORTEST_SENTENCE = 20  # bytes; the demo's questions are longer


@dataclass(frozen=True)
class Split:
    """Terms to train on, and held-out terms that occur in no training text."""

    train: tuple[Term, ...]
    held_out: tuple[Term, ...]


@functools.cache
def load_split(held_out_share: float = HELD_OUT_SHARE) -> Split:
    """Return CLDR's terms, split; the same on every machine with the same version of Babel."""
    return split_terms(load_terms(), held_out_share, keep_in_train={normalise(name) for name in _answers()})


def split_terms(terms: Iterable[Term], held_out_share: float, keep_in_train: Iterable[str] = ()) -> Split:
    """Hold out terms by the hash of their normalised text, so that equal strings of several languages stay together.

    A candidate that occurs inside a training term ("Niger" in "Nigeria") or in `keep_in_train` (normalised texts) goes
    back to training. So no held-out text is a substring of a training text.
    """
    terms = tuple(terms)
    texts = {normalise(term.text) for term in terms}
    candidates = {text for text in texts if _hash_fraction(text) < held_out_share}
    held_out = candidates - _found_inside(candidates, texts | set(keep_in_train)) - set(keep_in_train)
    return Split(
        train=tuple(term for term in terms if normalise(term.text) not in held_out),
        held_out=tuple(term for term in terms if normalise(term.text) in held_out),
    )


def build_documents(
    terms: Iterable[Term], passes: int, english_passes: int, seed: int, held_out: Iterable[Term] = ()
) -> list[str]:
    """Make documents of one language each, in shuffled order; every term occurs `passes` times, in different lists.

    English has its own number of passes, because it is the largest part of LOLA's text too, and the demo answers in
    English. A list is left out if its joining word creates a term of `held_out` ("Antigua na Barbuda").
    """
    rng = random.Random(seed)
    forbidden: defaultdict[str, set[str]] = defaultdict(set)
    for term in held_out:
        forbidden[term.language].add(normalise(term.text))
    groups: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for term in terms:
        groups[term.language, term.kind].append(term.text)
    documents = []
    for (language, _), group in groups.items():
        for _ in range(english_passes if language == "en" else passes):
            rng.shuffle(group)
            for names in _cut(group, rng):
                document = join_names(names, language)
                if not any(text in normalise(document) for text in forbidden[language]):
                    documents.append(document)
    rng.shuffle(documents)
    return documents


def build_corpus(
    names: Sequence[str], declarations: Iterable[Declaration], passes: int, names_share: float, seed: int
) -> list[str]:
    """Shuffle some of the documents of names and the declarations' sentences together, each sentence `passes` times.

    A sentence ends with the English name of its language ("Kila mtu … — Swahili"), so that the base knows the names
    that the demo asks for. Held-out articles are left out.

    Args:
        names_share: Share of `names` to take, drawn at random. With all of them, a third of the text would be names.
    """
    rng = random.Random(seed)
    sentences = [
        f"{sentence} — {declaration.name}"
        for declaration in declarations
        for sentence in sentences_of(declaration.training_paragraphs, SHORTEST_SENTENCE)
    ]
    documents = [*rng.sample(names, round(names_share * len(names))), *sentences * passes]
    rng.shuffle(documents)
    return documents


def write_texts(folder: Path, seed: int = 0, kind: str = "all", languages: Sequence[str] | None = None) -> list[Path]:
    """Write one file per language (`sw.txt`, `sr-Latn.txt`), with blank lines between its texts.

    Every name and every paragraph is written once, including held-out ones, because these texts are for examining a
    model, not for training it. Lists of names come before the declaration.

    Args:
        kind: `names` (CLDR's), `declaration` (of human rights), or `all`.
        languages: Tags to write; None writes all.

    Raises:
        DataError: The kind is unknown, or a language has no text.
    """
    if kind not in KINDS:
        raise DataError(f"--text {kind}: is unknown; choose one of {', '.join(KINDS)}.")
    texts_of: defaultdict[str, list[str]] = defaultdict(list)
    if kind != "declaration":
        for language, terms in _by_language(load_terms()).items():
            texts_of[language] += build_documents(terms, 1, 1, seed)
    if kind != "names":
        for tag, declaration in load_declarations().items():
            texts_of[tag] += [*declaration.training_paragraphs, *declaration.held_out_paragraphs]
    for language in languages or ():
        if language not in texts_of:
            near = "".join(f"Did you mean '{tag}'? " for tag in get_close_matches(language, texts_of, n=1))
            raise DataError(
                f"--languages {language}: there is no text in this language. {near}Choose among "
                f"{', '.join(sorted(texts_of))}."
            )
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for language in sorted(languages or texts_of):
        files.append(folder / f"{language}.txt")
        write_text(files[-1], "\n\n".join(texts_of[language]) + "\n")
    return files


def _by_language(terms: Iterable[Term]) -> dict[str, list[Term]]:
    terms_of: defaultdict[str, list[Term]] = defaultdict(list)
    for term in terms:
        terms_of[term.language].append(term)
    return terms_of


def _answers() -> set[str]:
    """Return the English names of the languages, which are the demo's answers and must occur in training text."""
    return {language_name(language) for language in {term.language for term in load_terms()}}


def _hash_fraction(text: str) -> float:
    """Map a text to a number in [0, 1) that depends only on the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _found_inside(candidates: set[str], texts: set[str]) -> set[str]:
    """Return the candidates that occur inside a training text, or inside a candidate that goes back to training."""
    if not candidates:
        return set()
    shortest, longest = min(map(len, candidates)), max(map(len, candidates))
    found: set[str] = set()
    # From long to short: before a candidate is reached, all texts that it could occur in have been searched.
    for text in sorted(texts, key=lambda text: (-len(text), text)):
        if text in candidates and text not in found:
            continue
        for start in range(len(text) - shortest + 1):
            for end in range(start + shortest, min(len(text), start + longest) + 1):
                if text[start:end] in candidates and end - start < len(text):
                    found.add(text[start:end])
    return found


def _cut(names: list[str], rng: random.Random) -> list[list[str]]:
    """Cut a list of names into lists of SHORTEST_LIST to LONGEST_LIST names (the last may be shorter)."""
    pieces = []
    start = 0
    while start < len(names):
        length = rng.randint(SHORTEST_LIST, LONGEST_LIST)
        pieces.append(names[start : start + length])
        start += length
    return pieces
