"""The families and scripts of languages: a table, and distances between languages computed from it.

`families.csv` follows the top-level families of Glottolog, with branches as handbooks and Ethnologue name them. It was
written from general knowledge of the field, not taken from a database. Creoles and pidgins are in the family of the
language that most of their words come from, as in Glottolog. Constructed languages have no family. The script is the
one that CLDR and CulturaX mostly use, unless a code names another (`sr_Latn`). `als` is Alemannic, as in CulturaX.
"""

import csv
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lola_ft.language_codes import short_code

_SCRIPTS = {
    "Arab": "Arabic", "Armn": "Armenian", "Beng": "Bengali", "Cyrl": "Cyrillic", "Deva": "Devanagari",
    "Ethi": "Ethiopic", "Geor": "Georgian", "Grek": "Greek", "Gujr": "Gujarati", "Guru": "Gurmukhi", "Hang": "Hangul",
    "Hans": "Han", "Hant": "Han", "Hebr": "Hebrew", "Jpan": "Japanese", "Khmr": "Khmer", "Knda": "Kannada",
    "Kore": "Hangul", "Laoo": "Lao", "Latn": "Latin", "Mlym": "Malayalam", "Mymr": "Myanmar", "Nkoo": "N'Ko",
    "Olck": "Ol Chiki", "Orya": "Odia", "Sinh": "Sinhala", "Syrc": "Syriac", "Taml": "Tamil", "Telu": "Telugu",
    "Thaa": "Thaana", "Tibt": "Tibetan",
}  # fmt: skip
"""Names of scripts by their code in ISO 15924."""
SAME_BRANCH, SAME_FAMILY, UNRELATED = 0, 1, 2


@dataclass(frozen=True)
class Language:
    """A row of the table; family and branch are empty for a constructed language."""

    code: str
    name: str
    family: str
    branch: str
    script: str


@functools.cache
def read_languages() -> dict[str, Language]:
    """Return the table, by ISO 639 code."""
    with Path(__file__).with_name("families.csv").open(encoding="utf-8", newline="") as file:
        return {row["code"]: Language(**row) for row in csv.DictReader(file)}


def find_language(code: str) -> Language | None:
    """Return the language of a code such as `sw`, `swh_Latn`, `pt-BR` or `sr_Latn` (with that script), or None."""
    first, *rest = code.replace("_", "-").split("-")
    found = read_languages().get(first) or read_languages().get(short_code(first))
    script = next((part for part in rest if len(part) == 4 and part.istitle()), None)
    return replace(found, script=_SCRIPTS.get(script, script)) if found and script else found


def describe(code: str) -> str:
    """Return a code with its language's name, "sw Swahili"; only the code if the language is unknown."""
    language = find_language(code)
    return f"{code} {language.name}" if language else code


def unknown_languages(codes: Sequence[str]) -> list[str]:
    """Return the codes that the table does not have."""
    return [code for code in codes if find_language(code) is None]


def not_in_table(codes: Sequence[str]) -> str:
    """Return a note on codes that the table does not have."""
    return (
        f"not in the table of languages: {', '.join(codes)}. The report has them without name, family and script, and "
        "the tests of descent leave them out. Are they ISO 639 codes, such as sw or swh_Latn?"
    )


def family_distances(languages: Sequence[Language]) -> Tensor:
    """Return distances by descent (L, L), float64: 0 in one branch, 1 in one family, otherwise 2."""
    rows = [[_descent(first, second) for second in languages] for first in languages]
    return torch.tensor(rows, dtype=torch.float64)


def script_distances(languages: Sequence[Language]) -> Tensor:
    """Return distances by script (L, L), float64: 0 for the same script, otherwise 1."""
    rows = [[first.script != second.script for second in languages] for first in languages]
    return torch.tensor(rows, dtype=torch.float64)


def _descent(first: Language, second: Language) -> int:
    if first.family != second.family:
        return UNRELATED
    return SAME_BRANCH if first.branch == second.branch else SAME_FAMILY
