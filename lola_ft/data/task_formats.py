"""Formats `classification` and `translation`: rows of columns, made into a request and its answer.

The request is the source's `instruction`. Fields it names in braces are put in their place; the others follow it as
`input`, a line each.
"""

import re
from functools import cache
from typing import Any

from lola_ft.data.example import Fields, prompt_fields
from lola_ft.data.fields import checked_text, field_name, raw_field, text_field, whole_number
from lola_ft.data.rows import Row, Source
from lola_ft.errors import DataError

CLASSIFY = "Name the label of the text."
CLASSIFY_AMONG = "Which of these labels fits the text: {labels}?"
TRANSLATE = "Translate from {source_language} to {target_language}."

_PLACE = re.compile(r"\{(\w+)\}")


def read_classification(row: Row, source: Source) -> tuple[Fields, str]:
    """Texts to classify and the word for their label."""
    texts = {"text": text_field(row, source, "text")}
    if pair := text_field(row, source, "text_pair", optional=True):
        texts["text_pair"] = pair
    answer = _label(row, source)
    extra = {"labels": ", ".join(dict.fromkeys(source.labels.values()))} if source.labels else {}
    request = source.instruction or (CLASSIFY_AMONG if source.labels else CLASSIFY)
    return _request(request, texts, extra, row), answer


def read_translation(row: Row, source: Source) -> tuple[Fields, str]:
    """A sentence and its translation."""
    texts = {"source": text_field(row, source, "source")}
    answer = text_field(row, source, "target")
    request = source.instruction or TRANSLATE
    sides = [side for side in ("source_language", "target_language") if f"{{{side}}}" in request]
    return _request(request, texts, {side: language_name(_side(row, source, side)) for side in sides}, row), answer


def read_pair(row: Row, source: Source) -> tuple[str, str]:
    """The two sentences, whichever is translated into which."""
    return alphabetical(text_field(row, source, "source"), text_field(row, source, "target"))


def alphabetical(one: str, other: str) -> tuple[str, str]:
    """Two texts, the first in the alphabet first."""
    return (one, other) if one <= other else (other, one)


def translation_language(row: Row, source: Source) -> str:
    """The code of the language translated into, under which a row counts."""
    return _side(row, source, "target_language")


@cache
def language_name(code: str) -> str:
    """A language's English name, such as Swahili for `sw`; the code itself where CLDR knows none."""
    from babel import Locale

    names = Locale("en").languages
    return names.get(code) or names.get(code.replace("-", "_")) or code


def _request(instruction: str, texts: dict[str, str], extra: dict[str, str], row: Row) -> Fields:
    """Put the fields named in braces into the instruction; the texts it does not name follow it."""
    named = set(_PLACE.findall(instruction))
    if "text_pair" in named and "text_pair" not in texts:
        raise DataError(f"{row.where}: the instruction uses {{text_pair}}, and this row has none.")
    values = texts | extra
    request = _PLACE.sub(lambda place: values.get(place[1], place[0]), instruction)
    return prompt_fields(request, "\n".join(text for name, text in texts.items() if name not in named))


def _label(row: Row, source: Source) -> str:
    """The word for a row's label: one of `labels`, or the label itself where it is text."""
    what = f"field '{field_name(source, 'label')}'"
    value = raw_field(row, source, "label")
    if source.labels is None:
        if isinstance(value, int | float):
            key = _key(value)
            raise DataError(f"{row.where}: {what} is {key}. Say what it means with {source.entry('labels', key, '…')}.")
        return checked_text(value, what, row.where)
    key = str(value) if str(value) in source.labels else _key(value)
    if key in source.labels:
        return source.labels[key]
    if value is None or not key.strip():
        raise DataError(f"{row.where}: {what} is empty. Fill it, or remove the row.")
    raise DataError(f"{row.where}: {what} is {key!r}, which is not among the labels ({', '.join(source.labels)}).")


def _key(value: Any) -> str:
    """Return a label as a recipe writes it: a whole number without the `.0` of a spreadsheet or of pandas."""
    if isinstance(value, bool):
        return str(value).lower()
    return whole_number(str(value).strip())


def _side(row: Row, source: Source, side: str) -> str:
    """The code of one side's language: the source's, or the row's."""
    code = getattr(source, side)
    return code if code is not None else text_field(row, source, side)
