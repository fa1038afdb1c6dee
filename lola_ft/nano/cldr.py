"""Real multilingual text without a download: names from Unicode CLDR, which the Babel package contains.

CLDR has the names of countries, languages, scripts, currencies, units, months and days in the world's languages. Only a
language's own file is read, without inherited names: if a name is missing, Babel's tables return the parent language's
name or a code, and some results depend on which language was read first.
"""

import functools
import pickle
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babel.localedata import locale_identifiers, resolve_locale_filename

MIN_TERMS = 400
"""Fewest names of a language that is used; fewer names are not a reliable sample of the language."""

MAX_COPIED = 0.5
"""Largest share of a language's names that another language may have too; beyond it, CLDR's file is mostly a copy."""

MAX_CHARACTERS = 60


@dataclass(frozen=True, order=True)
class Term:
    """A name and the language that it is written in."""

    text: str
    language: str  # ISO 639 code, as CLDR names its files
    kind: str  # territory | language | script | currency | unit | month | day


@functools.cache
def normalise(text: str) -> str:
    """Return the form that decides if two names are equal: composed, without case and repeated spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


@functools.cache
def load_terms() -> tuple[Term, ...]:
    """Return all usable names of all chosen languages, sorted by language, kind and text.

    All languages except English keep only names that English does not have, because CLDR does not distinguish a shared
    name from a missing translation.
    """
    english = {normalise(text) for _, text in _names("en")}
    by_language = {"en": _clean("en", set())}
    for language in _language_codes():
        terms = _clean(language, english)
        if len(terms) >= MIN_TERMS:
            by_language[language] = terms
    kept = _without_copies(by_language)
    return tuple(term for language in sorted(kept) for term in sorted(kept[language], key=lambda t: (t.kind, t.text)))


def english_names() -> dict[str, str]:
    """Return CLDR's English names of languages, by code."""
    return _own_file("en")["languages"]


def language_name(language: str) -> str:
    """Return the English name of a language, such as "Swahili" for "sw"."""
    return english_names()[language]


def join_names(names: list[str], language: str) -> str:
    """Join names to a list in the style of the language, such as "Kenya, Uganda na Tanzania"."""
    patterns = dict.fromkeys(("start", "middle", "end", "2"), "{0}, {1}")
    patterns |= _own_file(language).get("list_patterns", {}).get("standard", {})
    if len(names) < 3:
        return patterns["2"].format(*names) if len(names) == 2 else names[0]
    text = patterns["end"].format(names[-2], names[-1])
    for name in reversed(names[1:-2]):
        text = patterns["middle"].format(name, text)
    return patterns["start"].format(names[0], text)


@functools.cache
def _own_file(language: str) -> dict[str, Any]:
    """Return CLDR's own data of a language, without inherited data, which `babel.localedata.load` would add."""
    return pickle.loads(Path(resolve_locale_filename(language)).read_bytes())


def _language_codes() -> list[str]:
    """Return one code per language with an English name, without regional and script variants."""
    english_names = _own_file("en")["languages"]
    return sorted(code for code in locale_identifiers() if "_" not in code and code != "en" and code in english_names)


def _names(language: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) of all names in a language's own file."""
    data = _own_file(language)
    units = data.get("unit_display_names", {})
    for kind, table in (
        ("territory", data.get("territories", {})),
        ("language", data.get("languages", {})),
        ("script", data.get("scripts", {})),
        ("currency", data.get("currency_names", {})),
        ("unit", {code: names.get("long") for code, names in units.items()}),
        *((kind, _wide(data, f"{kind}s", form)) for kind in ("month", "day") for form in ("stand-alone", "format")),
    ):
        for code, text in sorted(table.items()):
            if isinstance(text, str) and text != code:
                yield kind, text


def _wide(data: Mapping[str, Any], key: str, form: str) -> Mapping[int, str]:
    """Return full names of months or days, standing by themselves ("январь") or in a date ("января"); {} if missing."""
    table = data.get(key, {}).get(form)
    names = table.get("wide") if isinstance(table, Mapping) else None
    return names if isinstance(names, Mapping) else {}


def _clean(language: str, not_these: set[str]) -> list[Term]:
    """Return a language's distinct names, without codes, numbers, long names and those in `not_these`."""
    seen = set(not_these)
    terms = []
    for kind, text in _names(language):
        text = " ".join(unicodedata.normalize("NFC", text.translate(_INVISIBLE)).split())
        key = normalise(text)
        if key in seen or not _is_name(text):
            continue
        seen.add(key)
        terms.append(Term(text, language, kind))
    return terms


def _is_name(text: str) -> bool:
    """Tell whether a text has 2 to MAX_CHARACTERS characters, a letter and no digit."""
    return 2 <= len(text) <= MAX_CHARACTERS and not any(map(str.isdigit, text)) and _LETTER.search(text) is not None


_LETTER = re.compile(r"[^\W\d_]")
_INVISIBLE = dict.fromkeys(map(ord, "\u200e\u200f\u061c\u00ad"))  # direction marks, soft hyphen


def _without_copies(by_language: dict[str, list[Term]]) -> dict[str, list[Term]]:
    """Leave out languages whose names are mostly a more widespread language's, as Haitian Creole's are French."""
    spread = _territories_by_language()
    kept: dict[str, list[Term]] = {}
    owners: dict[str, list[str]] = {}
    for language, terms in sorted(by_language.items(), key=lambda item: (-spread[item[0]], -len(item[1]), item[0])):
        shared = Counter(owner for term in terms for owner in owners.get(normalise(term.text), []))
        if shared and max(shared.values()) > MAX_COPIED * len(terms):
            continue
        kept[language] = terms
        for term in terms:
            owners.setdefault(normalise(term.text), []).append(language)
    return kept


def _territories_by_language() -> Counter[str]:
    """Count the countries for which CLDR has a locale, by language."""
    pairs = {(code.split("_")[0], code.split("_")[-1]) for code in locale_identifiers() if "_" in code}
    return Counter(language for language, territory in pairs if territory.isupper() or territory.isdigit())
