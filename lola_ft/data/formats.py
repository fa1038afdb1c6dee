"""Formats of rows: each turns a row's fields into one Example."""

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from lola_ft.data.bad_rows import BadRows
from lola_ft.data.conversations import read_conversation
from lola_ft.data.example import UNKNOWN_LANGUAGE, Example, Exchange, Fields, prompt_fields
from lola_ft.data.fields import language_of, text_field, unused_fields
from lola_ft.data.preferences import read_answer, read_chosen, read_label, read_rejected
from lola_ft.data.rows import BadRow, Findings, Row, Source
from lola_ft.data.source_rows import scan_rows
from lola_ft.data.task_formats import (
    alphabetical,
    read_classification,
    read_pair,
    read_translation,
    translation_language,
)
from lola_ft.errors import DataError
from lola_ft.row_formats import FORMAT_FIELDS


def read_examples(
    sources: Iterable[Source],
    bad_rows: BadRows | None = None,
    normalize: str = "none",
    findings: dict[str, Findings] | None = None,
) -> Iterator[Example]:
    """The examples of all sources, in their order.

    Args:
        bad_rows: Collects the rows that cannot be used, which are then skipped; None refuses them.
        normalize: `nfc` composes characters (Unicode's form C); `none` leaves every character as it is.
        findings: Takes what was found in each source, by the source's name.

    Raises:
        DataError: A source that cannot be read; without `bad_rows`, the first row that cannot be used. It names file
            and line.
    """
    for source in sources:
        found = Findings() if findings is None else findings.setdefault(source.name, Findings())
        usable = 0
        for row in scan_rows(source, found):
            try:
                if isinstance(row, BadRow):
                    raise DataError(row.message)
                example = to_example(row, source)
            except DataError as error:
                if bad_rows is None:
                    raise
                bad_rows.add(source, str(error))
                continue
            usable += 1
            found.rows += 1
            found.unused.update(unused_fields(row))
            yield composed(example) if normalize == "nfc" else example
        if not usable and bad_rows is not None:
            raise DataError(f"{source.name}: no row can be used. The first: {bad_rows.first(source)}")


def to_example(row: Row, source: Source) -> Example:
    """Read a row by its source's format; raises DataError if a field is missing, empty, or not what it needs."""
    *earlier, (prompt, completion) = FORMATS[source.format].read(row, source)
    example = Example(prompt, completion, row_language(row, source), row.where, tuple(earlier))  # type: ignore[arg-type]
    if source.format == "preference":
        return replace(example, rejected=read_rejected(row, source))
    if source.format == "unpaired_preference":
        return replace(example, desirable=read_label(row, source))
    if source.format == "translation":
        return replace(example, pair=read_pair(row, source))
    return example


def composed(example: Example) -> Example:
    """The example with every text in Unicode's form C."""
    earlier = tuple((_composed(fields), _nfc(answer)) for fields, answer in example.earlier)
    prompt = None if example.prompt is None else _composed(example.prompt)
    rejected = None if example.rejected is None else _nfc(example.rejected)
    pair = None if example.pair is None else alphabetical(*map(_nfc, example.pair))
    return replace(
        example, prompt=prompt, completion=_nfc(example.completion), earlier=earlier, rejected=rejected, pair=pair
    )


def _composed(fields: Fields) -> Fields:
    plain = {name: _nfc(value) for name, value in fields.items() if isinstance(value, str)}
    turns = [message | {"content": _nfc(message["content"])} for message in fields.get("messages", ())]
    return plain | {"messages": turns} if turns else plain


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _alpaca(row: Row, source: Source) -> list[tuple[Fields, str]]:
    instruction = source.instruction or text_field(row, source, "instruction")
    given = text_field(row, source, "input", optional=True)
    return [(prompt_fields(instruction, given), text_field(row, source, "output"))]


def _prompt_completion(row: Row, source: Source) -> list[Exchange]:
    return [(prompt_fields(text_field(row, source, "prompt")), text_field(row, source, "completion"))]


Reader = Callable[[Row, Source], list[Exchange] | list[tuple[None, str]]]


@dataclass(frozen=True)
class Format:
    """A format's standard fields and the function that reads a row as exchanges; a text is one without a prompt."""

    fields: tuple[str, ...]
    read: Reader


_READERS: dict[str, Reader] = {
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": lambda row, source: [(None, text_field(row, source, "text"))],
    "messages": read_conversation,
    "classification": lambda row, source: [read_classification(row, source)],
    "translation": lambda row, source: [read_translation(row, source)],
    "preference": read_chosen,
    "unpaired_preference": read_answer,
}
FORMATS = {name: Format(FORMAT_FIELDS[name], read) for name, read in _READERS.items()}


def row_language(row: Row, source: Source) -> str:
    """Return the language that a row counts under: the source's, the row's, or the one it is translated into."""
    if source.language_column is not None:
        return language_of(row, source.language_column)
    if source.language is not None:
        return source.language
    return translation_language(row, source) if source.format == "translation" else UNKNOWN_LANGUAGE
