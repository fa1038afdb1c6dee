"""The Universal Declaration of Human Rights in many languages: real sentences, the same 30 articles in each.

The package has the texts in `declaration.jsonl.xz`; `declaration.md` beside it names their source and terms. Article n
says the same in every language, so the texts are parallel by article, although not by paragraph or sentence.

Articles 26 to 30 are held out: the nano base is not pre-trained on them, and the demo's test uses only them.
"""

import functools
import json
import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lola_ft.errors import DataError

DECLARATION_FILE = Path(__file__).with_name("declaration.jsonl.xz")
NUM_ARTICLES = 30
HELD_OUT_ARTICLES = range(26, 31)
"""Articles that are in no pre-training text and in no training row of the demo, in any language."""

_REINSTALL = "Install lola_ft again: pip install --force-reinstall --no-deps lola-ft."


@dataclass(frozen=True)
class Article:
    """One article: a heading such as "Article 1", then one paragraph or more."""

    heading: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        """The paragraphs, one per line, without the heading."""
        return "\n".join(self.paragraphs)


@dataclass(frozen=True)
class Declaration:
    """The declaration in one language and script.

    Attributes:
        tag: BCP 47 tag: CLDR's code of the language, and the script if it is not the usual one (`sr`, `sr-Latn`).
        name: English name of the language.
        latitude, longitude: One place in the area where the language is spoken, in degrees.
        preamble: Paragraphs; empty if the source has none (Guarani).
        articles: All 30; article n is `articles[n - 1]`.
    """

    tag: str
    name: str
    latitude: float
    longitude: float
    title: str
    preamble: tuple[str, ...]
    articles: tuple[Article, ...]

    @property
    def language(self) -> str:
        """The tag without a script."""
        return self.tag.partition("-")[0]

    @property
    def training_paragraphs(self) -> list[str]:
        """Paragraphs to train on: title, preamble and the articles that are not held out, without headings."""
        articles = (article for number, article in enumerate(self.articles, 1) if number not in HELD_OUT_ARTICLES)
        return [self.title, *self.preamble, *(paragraph for article in articles for paragraph in article.paragraphs)]

    @property
    def held_out_paragraphs(self) -> list[str]:
        """Paragraphs of the held-out articles, without headings."""
        return [paragraph for number in HELD_OUT_ARTICLES for paragraph in self.articles[number - 1].paragraphs]


@functools.cache
def load_declarations() -> dict[str, Declaration]:
    """Return the package's declarations by tag, sorted by tag.

    Raises:
        DataError: The package's file is missing or damaged.
    """
    return read_declarations(DECLARATION_FILE)


def find_declaration(tag: str) -> Declaration:
    """Return the declaration of a tag.

    Raises:
        DataError: There is no declaration with this tag.
    """
    declarations = load_declarations()
    if tag not in declarations:
        names = {declaration.name.lower(): tag for tag, declaration in declarations.items()}
        near = names.get(tag.lower()) or next(iter(get_close_matches(tag, declarations, n=1)), None)
        hint = f"Did you mean '{near}'? " if near else ""
        raise DataError(
            f"{tag}: there is no declaration in this language. {hint}There are {len(declarations)}: "
            f"{', '.join(declarations)}."
        )
    return declarations[tag]


def parallel_articles(number: int, tags: Iterable[str] | None = None) -> dict[str, Article]:
    """Return one article in several languages, by tag; `tags` None means all languages.

    Raises:
        DataError: The number is not from 1 to 30, or a tag has no declaration.
    """
    if not 1 <= number <= NUM_ARTICLES:
        raise DataError(f"article {number}: the declaration has articles 1 to {NUM_ARTICLES}.")
    wanted = load_declarations() if tags is None else tags
    return {tag: find_declaration(tag).articles[number - 1] for tag in wanted}


def read_declarations(path: Path) -> dict[str, Declaration]:
    """Read a file of declarations: xz, one JSON object per line.

    Raises:
        DataError: The file is missing, damaged or incomplete; the message names the line and the language.
    """
    try:
        lines = lzma.decompress(path.read_bytes()).decode().splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: the declaration's texts are missing. {_REINSTALL}") from None
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the declaration's texts cannot be read ({error}). {_REINSTALL}") from None
    declarations: dict[str, Declaration] = {}
    for number, line in enumerate(lines, 1):
        try:
            declaration = _declaration_of(json.loads(line))
            if declaration.tag in declarations:
                raise ValueError(f"{declaration.tag} occurs twice")
        except (ValueError, KeyError, TypeError) as error:
            what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path}:{number}: is not a declaration ({what}). {_REINSTALL}") from None
        declarations[declaration.tag] = declaration
    if not declarations:
        raise DataError(f"{path}: holds no declaration. {_REINSTALL}")
    return declarations


def _declaration_of(row: dict[str, Any]) -> Declaration:
    """Build a declaration from a line's fields.

    Raises:
        ValueError: An article is missing or empty.
        KeyError, TypeError: A field is missing or of a wrong type.
    """
    articles = tuple(Article(article["heading"], _paragraphs(article["paragraphs"])) for article in row["articles"])
    empty = [number for number, article in enumerate(articles, 1) if not article.text.strip()]
    if len(articles) != NUM_ARTICLES or empty:
        wrong = f"article {empty[0]} is empty" if empty else f"{len(articles)} articles, not {NUM_ARTICLES}"
        raise ValueError(f"{row['tag']}: {wrong}")
    return Declaration(
        tag=row["tag"],
        name=row["name"],
        latitude=float(row["latitude"]),
        longitude=float(row["longitude"]),
        title=row["title"],
        preamble=_paragraphs(row["preamble"]),
        articles=articles,
    )


def _paragraphs(texts: list[str]) -> tuple[str, ...]:
    """Check that the paragraphs are a list of texts."""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError("paragraphs are not a list of texts")
    return tuple(texts)
