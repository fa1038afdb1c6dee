"""What languages descend from and how they are written: a table, and distances between languages made of it.

`families.csv` follows the top-level families of Glottolog, with branches as handbooks and Ethnologue name them. It was
written down from general knowledge of the field, not taken from a database. Creoles and pidgins stand with the language
that gave them their words, as in Glottolog; constructed languages have no family. Script: the one that CLDR, and
CulturaX's text, mostly use, unless a code says another one (`sr_Latn`). `als` is Alemannic, as in CulturaX.
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
"""ISO 15924's codes of scripts that are not called what their code says."""
SAME_BRANCH, SAME_FAMILY, UNRELATED = 0, 1, 2


@dataclass(frozen=True)
class Language:
    """A line of the table; family and branch are empty for a constructed language."""

    code: str
    name: str
    family: str
    branch: str
    script: str


@functools.cache
def read_languages() -> dict[str, Language]:
    """The table, by ISO 639 code."""
    with Path(__file__).with_name("families.csv").open(encoding="utf-8", newline="") as file:
        return {row["code"]: Language(**row) for row in csv.DictReader(file)}


def find_language(code: str) -> Language | None:
    """The language of a code such as `sw`, `swh_Latn`, `pt-BR` or `sr_Latn` (in that script); None if there is none."""
    first, *rest = code.replace("_", "-").split("-")
    found = read_languages().get(first) or read_languages().get(short_code(first))
    script = next((part for part in rest if len(part) == 4 and part.istitle()), None)
    return replace(found, script=_SCRIPTS.get(script, script)) if found and script else found


def describe(code: str) -> str:
    """ "sw Swahili" if the language is known, else the code."""
    language = find_language(code)
    return f"{code} {language.name}" if language else code


def unknown_languages(codes: Sequence[str]) -> list[str]:
    """Return the codes that the table does not have."""
    return [code for code in codes if find_language(code) is None]


def not_in_table(codes: Sequence[str]) -> str:
    """Say of codes that the table does not have what that means."""
    return (
        f"not in the table of languages: {', '.join(codes)}. They are in the report without name, family and script, "
        "and not in the tests of descent. Are they ISO 639 codes, as sw or swh_Latn?"
    )


def family_distances(languages: Sequence[Language]) -> Tensor:
    """Distance by descent (L, L), float64: 0 in one branch, 1 in one family, 2 else."""
    rows = [[_descent(first, second) for second in languages] for first in languages]
    return torch.tensor(rows, dtype=torch.float64)


def script_distances(languages: Sequence[Language]) -> Tensor:
    """0 where two languages are written in the same script, else 1 (L, L), float64."""
    rows = [[first.script != second.script for second in languages] for first in languages]
    return torch.tensor(rows, dtype=torch.float64)


def _descent(first: Language, second: Language) -> int:
    if first.family != second.family:
        return UNRELATED
    return SAME_BRANCH if first.branch == second.branch else SAME_FAMILY
