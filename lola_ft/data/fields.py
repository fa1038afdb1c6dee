"""Reading one field of a row as text. If that fails, the message says why and how to map the field."""

import re
from collections.abc import Mapping
from typing import Any

from lola_ft.data.rows import Row, Source
from lola_ft.errors import DataError, in_words
from lola_ft.row_formats import FORMAT_FIELDS, MESSAGE_KEYS

_ABSENT = object()


def text_field(row: Row, source: Source, standard: str, optional: bool = False) -> str:
    """Return a standard field's text; "" if it is optional and blank, null, or missing and not mapped."""
    value = raw_field(row, source, standard, optional)
    if optional and (value is None or (isinstance(value, str) and not value.strip())):
        return ""
    return checked_text(value, f"field '{field_name(source, standard)}'", row.where)


def raw_field(row: Row, source: Source, standard: str, optional: bool = False) -> Any:
    """Return a standard field's value of any type; None if it is optional, missing and not mapped."""
    value = _value_at(row, field_name(source, standard))
    if value is not _ABSENT:
        return value
    if optional and standard not in source.fields:
        return None
    raise DataError(_missing(row, source, standard))


def field_name(source: Source, standard: str) -> str:
    """Return the source's name for a standard field."""
    return source.fields.get(standard, standard)


def checked_text(value: Any, what: str, where: str) -> str:
    """Return `value` if it is text that can be learned, else raise a DataError about `what` (`field 'output'`)."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} must be text; found {in_words(value)}.")
    if not value.strip():
        raise DataError(f"{where}: {what} is empty. Fill it, or remove the row.")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise DataError(f"{where}: {what} holds half a surrogate pair, which is not valid text. Remove it.")
    return value


def language_of(row: Row, column: str) -> str:
    """Return a row's language code; raises DataError if it is missing, empty, or not text."""
    code = _value_at(row, column)
    if code is _ABSENT:
        raise DataError(f"{row.where}: language column '{column}' is missing (found: {found_fields(row)}).")
    return checked_text(code, f"field '{column}'", row.where)


def whole_number(text: str) -> str:
    """Return a whole number without the `.0` that pandas and spreadsheets add; other text unchanged."""
    return text.partition(".")[0] if _WHOLE_FLOAT.fullmatch(text) else text


_WHOLE_FLOAT = re.compile(r"-?[0-9]+\.0+")


def found_fields(row: Row) -> str:
    """Return the names of a row's fields, for a message."""
    return ", ".join(map(str, row.fields)) or "no fields"


def wanted_fields(source: Source) -> set[str]:
    """Return the names, in the file, of the fields that a source's format reads."""
    names = [source.fields.get(name, name) for name in FORMAT_FIELDS.get(source.format, ())]
    return {*names, *(name.partition(".")[0] for name in names)}


def unused_fields(row: Row) -> list[str]:
    """List the fields that are not blank and were not read; fields of messages as `messages[].name`."""
    unused = [name for name, value in row.fields.items() if name not in row.read and not _is_blank(value)]
    for name in row.read & row.fields.keys():
        messages = row.fields[name]
        if isinstance(messages, list):
            turns = [item for item in messages if isinstance(item, Mapping) and MESSAGE_KEYS & item.keys()]
            inside = {key for turn in turns for key in turn if not _is_blank(turn[key])}
            unused += [f"{name}[].{key}" for key in sorted(map(str, inside - MESSAGE_KEYS))]
    return unused


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _value_at(row: Row, name: str) -> Any:
    """Return a field by its name, or by a path into objects and lists such as `answers.text.0`."""
    fields = row.fields
    if name in fields:
        row.read.add(name)
        return fields[name]
    row.read.add(name.partition(".")[0])
    value: Any = fields
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isascii() and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _ABSENT
    return value


def _missing(row: Row, source: Source, standard: str) -> str:
    taken = {*FORMAT_FIELDS[source.format], *source.fields.values(), source.language_column}
    spare = [other for other in row.fields if other not in taken]
    within = [f"{name}.{key}" for name in spare if isinstance(row.fields[name], Mapping) for key in row.fields[name]]
    return (
        f"{row.where}: field '{field_name(source, standard)}' is missing (found: {found_fields(row)}). "
        f"Map it with {source.entry('fields', standard, _likely(standard, spare, within))}."
    )


def _likely(standard: str, spare: list[str], within: list[str]) -> str:
    """Return the row's field, or the path inside one, that probably holds `standard`; "…" if none does."""
    if exact := [path for path in within if path.endswith(f".{standard}")]:
        return exact[0]
    for word in _ALSO_CALLED.get(standard, ()):
        for name in spare:
            if word in name.lower():
                return name
    return spare[0] if len(spare) == 1 else "…"


_ALSO_CALLED = {
    "instruction": ("instruct", "question", "prompt", "query", "input"),
    "input": ("input", "context"),
    "output": ("output", "answer", "response", "completion", "target", "reply"),
    "prompt": ("prompt", "question", "instruct", "query", "source", "input"),
    "chosen": ("chosen", "preferred", "winner", "better", "positive", "accepted"),
    "rejected": ("reject", "dispreferred", "loser", "worse", "negative"),
    "completion": ("completion", "answer", "response", "output", "target", "reply"),
    "text": ("text", "content", "document", "sentence", "premise", "review"),
    "messages": ("messages", "conversation", "dialog", "chat", "turns"),
    "label": ("label", "class", "category", "sentiment", "gold", "target"),
    "source": ("source", "src"),
    "target": ("target", "tgt", "trg", "translation"),
}
