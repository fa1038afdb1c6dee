"""What a row's fields mean: from a row of some format to one Example, whatever the format."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lola_ft.data.sources import Row, Source, read_rows
from lola_ft.errors import DataError

UNKNOWN_LANGUAGE = "und"
"""The language code for 'undetermined' (ISO 639-2), where a source names none."""


@dataclass(frozen=True, slots=True)
class Example:
    """What the model reads and what it learns to write."""

    prompt: Mapping[str, str] | None
    """Fields a template renders (`prompt_fields`); None where the whole text is learned."""
    completion: str
    language: str
    where: str


def read_examples(sources: Iterable[Source]) -> Iterator[Example]:
    """The examples of all sources, in their order.

    Raises:
        DataError: From the first row that cannot be used; it names file and line.
    """
    for source in sources:
        for row in read_rows(source):
            yield to_example(row, source)


def to_example(row: Row, source: Source) -> Example:
    """Read a row by its source's format.

    Raises:
        DataError: A field is missing, empty, or not text.
    """
    prompt, completion = FORMATS[source.format].read(row, source)
    return Example(prompt, completion, _language(row, source), row.where)


def prompt_fields(instruction: str, input: str = "") -> dict[str, str]:
    """The fields every template may use: `instruction`, `input`, and both in one as `prompt`."""
    prompt = f"{instruction}\n\n{input}" if input else instruction
    return {"instruction": instruction, "input": input, "prompt": prompt}


def _alpaca(row: Row, source: Source) -> tuple[dict[str, str], str]:
    instruction = _text(row, source, "instruction")
    given = _text(row, source, "input", optional=True)
    return prompt_fields(instruction, given), _text(row, source, "output")


def _prompt_completion(row: Row, source: Source) -> tuple[dict[str, str], str]:
    return prompt_fields(_text(row, source, "prompt")), _text(row, source, "completion")


def _whole_text(row: Row, source: Source) -> tuple[None, str]:
    return None, _text(row, source, "text")


@dataclass(frozen=True)
class Format:
    """A format's standard fields and the function that reads them."""

    fields: tuple[str, ...]
    read: Callable[[Row, Source], tuple[dict[str, str] | None, str]]


FORMATS = {
    "alpaca": Format(("instruction", "input", "output"), _alpaca),
    "prompt_completion": Format(("prompt", "completion"), _prompt_completion),
    "text": Format(("text",), _whole_text),
}


def _text(row: Row, source: Source, standard: str, optional: bool = False) -> str:
    """The text of a standard field; "" for an optional one that is null or blank, or missing and not mapped."""
    name = source.fields.get(standard, standard)
    if name not in row.fields:
        if optional and standard not in source.fields:
            return ""
        raise DataError(_missing(row, source, standard))
    value = row.fields[name]
    if optional and (value is None or (isinstance(value, str) and not value.strip())):
        return ""
    return _checked(value, name, row.where)


def _checked(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: field '{name}' must be text; found {type(value).__name__}.")
    if not value.strip():
        raise DataError(f"{where}: field '{name}' is empty. Fill it, or remove the row.")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise DataError(f"{where}: field '{name}' holds half a surrogate pair, which is no text. Remove it.")
    return value


def _missing(row: Row, source: Source, standard: str) -> str:
    name = source.fields.get(standard, standard)
    found = ", ".join(map(str, row.fields)) or "no fields"
    start = f"{row.where}: field '{name}' is missing (found: {found})."
    taken = {*FORMATS[source.format].fields, *source.fields.values(), source.language_column}
    spare = [other for other in row.fields if other not in taken]
    guess = _likely(standard, spare)
    return f"{start} Map it with `fields: {{{standard}: {guess}}}`."


def _likely(standard: str, spare: list[str]) -> str:
    """The row's field that probably holds `standard`."""
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
    "completion": ("completion", "answer", "response", "output", "target", "reply"),
    "text": ("text", "content", "document", "sentence"),
}


def _language(row: Row, source: Source) -> str:
    if source.language_column is None:
        return source.language or UNKNOWN_LANGUAGE
    if source.language_column not in row.fields:
        found = ", ".join(map(str, row.fields)) or "no fields"
        raise DataError(f"{row.where}: language_column '{source.language_column}' is missing (found: {found}).")
    return _checked(row.fields[source.language_column], source.language_column, row.where)
