"""Formats `classification` and `translation`: the columns of a row become a request and its answer.

The request is the source's `instruction`. Fields that it names in braces are inserted there. Fields that it does not
name follow as `input`, one per line.
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
    """Read the texts to classify and the word for their label."""
    texts = {"text": text_field(row, source, "text")}
    if pair := text_field(row, source, "text_pair", optional=True):
        texts["text_pair"] = pair
    answer = _label(row, source)
    extra = {"labels": ", ".join(dict.fromkeys(source.labels.values()))} if source.labels else {}
    request = source.instruction or (CLASSIFY_AMONG if source.labels else CLASSIFY)
    return _request(request, texts, extra, row), answer


def read_translation(row: Row, source: Source) -> tuple[Fields, str]:
    """Read a sentence and its translation."""
    texts = {"source": text_field(row, source, "source")}
    answer = text_field(row, source, "target")
    request = source.instruction or TRANSLATE
    sides = [side for side in ("source_language", "target_language") if f"{{{side}}}" in request]
    return _request(request, texts, {side: language_name(_side(row, source, side)) for side in sides}, row), answer


def read_pair(row: Row, source: Source) -> tuple[str, str]:
    """Read the two sentences, in an order that does not depend on the direction of translation."""
    return alphabetical(text_field(row, source, "source"), text_field(row, source, "target"))


def alphabetical(one: str, other: str) -> tuple[str, str]:
    """Return two texts in alphabetical order."""
    return (one, other) if one <= other else (other, one)


def translation_language(row: Row, source: Source) -> str:
    """Return the code of the target language, which is the row's language."""
    return _side(row, source, "target_language")


@cache
def language_name(code: str) -> str:
    """Return a language's English name, such as Swahili for `sw`; the code itself if CLDR has no name."""
    from babel import Locale

    names = Locale("en").languages
    return names.get(code) or names.get(code.replace("-", "_")) or code


def _request(instruction: str, texts: dict[str, str], extra: dict[str, str], row: Row) -> Fields:
    """Insert the fields named in braces into the instruction; other texts become the input."""
    named = set(_PLACE.findall(instruction))
    if "text_pair" in named and "text_pair" not in texts:
        raise DataError(f"{row.where}: the instruction uses {{text_pair}}, and this row has no text_pair.")
    values = texts | extra
    request = _PLACE.sub(lambda place: values.get(place[1], place[0]), instruction)
    return prompt_fields(request, "\n".join(text for name, text in texts.items() if name not in named))


def _label(row: Row, source: Source) -> str:
    """Return the word for a row's label: from the source's `labels`, else the label itself if it is text."""
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
    """Return a label as written in a recipe: a whole number without the `.0` of spreadsheets and pandas."""
    if isinstance(value, bool):
        return str(value).lower()
    return whole_number(str(value).strip())


def _side(row: Row, source: Source, side: str) -> str:
    """Return the language code of one side (source or target), set by the source or the row."""
    code = getattr(source, side)
    return code if code is not None else text_field(row, source, side)
