"""The demo's task: name the language of a sentence. Rows for fine-tuning and a held-out test, as JSONL files.

Training sentences come from the declaration's articles 1 to 25 (and preamble), test sentences from articles 26 to 30. A
language that is written in two scripts has two texts and one name. Texts that look like one in another language give
more training rows: Serbian in Cyrillic, beside Bosnian in Cyrillic, has nearly four times as many as Georgian. With
fewer, one of two neighbours often got all answers of both.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lola_ft.nano.cldr import normalise
from lola_ft.nano.declaration import Declaration
from lola_ft.nano.sentences import sentences_of

SHORTEST_PIECE, LONGEST_PIECES = 40, (240, 150, 90)  # bytes of a training row, for each way to cut
PROMPT = "{sentence} —"
"""The form in which the nano base's text signs a sentence. With another form, one expert got nearly all tokens."""


@dataclass(frozen=True)
class Row:
    """One example; the completion starts with the space that separates it from the prompt.

    Attributes:
        language: Tag of the text, with a script if the language has two texts.
    """

    prompt: str
    completion: str
    language: str


def build_rows(
    declarations: Mapping[str, Declaration], train_per_language: int, test_per_language: int, seed: int = 0
) -> tuple[list[Row], list[Row]]:
    """Return training rows and test rows, both shuffled.

    A text gives `train_per_language` training rows on average (`row_counts`), with repeated pieces if it has fewer, and
    up to `test_per_language` test rows of different sentences. A sentence that also occurs in training text, or in two
    languages, is not used for testing.
    """
    rng = random.Random(seed)
    pieces_of = {tag: _training_pieces(declaration) for tag, declaration in declarations.items()}
    train: list[Row] = []
    for tag, count in row_counts(declarations, train_per_language).items():
        again = -(-count // max(len(pieces_of[tag]), 1))
        train += [_row(piece, tag, declarations[tag]) for piece in rng.sample(pieces_of[tag] * again, count)]
    test: list[Row] = []
    for tag, sentences in _test_sentences(declarations, pieces_of).items():
        asked = rng.sample(sentences, min(test_per_language, len(sentences)))
        test += [_row(sentence, tag, declarations[tag]) for sentence in asked]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def row_counts(declarations: Mapping[str, Declaration], mean: int) -> dict[str, int]:
    """Return the number of training rows of each text: proportional to 1 / (1.3 - likeness to the most similar one).

    The likeness, from 0 to 1, is the cosine of the counts of three characters in a row: 0.98 for Bosnian and Croatian,
    0.92 for Indonesian and Malay, 0.8 for Kinyarwanda and Rundi. Texts of one language do not count, since they have
    the same answer.
    """
    # Counts of three characters (texts, different threes), each vector scaled to length 1
    columns: dict[str, int] = {}
    counts = [
        Counter(columns.setdefault(three, len(columns)) for three in _threes(declaration))
        for declaration in declarations.values()
    ]
    vectors = np.zeros((len(counts), len(columns)), dtype=np.float32)
    for vector, count in zip(vectors, counts, strict=True):
        vector[list(count)] = list(count.values())
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = np.array([declaration.name for declaration in declarations.values()])
    likeness = np.where(names[:, None] == names, 0, vectors @ vectors.T).max(axis=1)
    shares = 1 / (1.3 - likeness)
    shares /= shares.mean()
    # Two digits, so that the last bits of a sum do not decide
    return {tag: round(mean * round(float(share), 2)) for tag, share in zip(declarations, shares, strict=True)}


def _threes(declaration: Declaration) -> list[str]:
    text = " ".join(declaration.training_paragraphs).lower()
    return [text[start : start + 3] for start in range(len(text) - 2)]


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _row(sentence: str, tag: str, declaration: Declaration) -> Row:
    return Row(PROMPT.format(sentence=sentence), f" {declaration.name}", tag)


def _training_pieces(declaration: Declaration) -> list[str]:
    """Return the training text cut into sentences and, to have more and shorter rows, into parts of sentences."""
    cuts = (sentences_of(declaration.training_paragraphs, SHORTEST_PIECE, most) for most in LONGEST_PIECES)
    return list(dict.fromkeys(piece for pieces in cuts for piece in pieces))


def _test_sentences(
    declarations: Mapping[str, Declaration], pieces_of: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """Return held-out sentences by tag, without those that occur in a training row, in training text, or twice."""
    trained = {tag: normalise("\n".join(found.training_paragraphs)) for tag, found in declarations.items()}
    rows = {normalise(piece) for pieces in pieces_of.values() for piece in pieces}
    sentences = {tag: list(dict.fromkeys(sentences_of(d.held_out_paragraphs))) for tag, d in declarations.items()}
    texts = Counter(normalise(sentence) for found in sentences.values() for sentence in found)
    return {
        tag: [s for s in found if texts[key := normalise(s)] == 1 and key not in rows and key not in trained[tag]]
        for tag, found in sentences.items()
    }
