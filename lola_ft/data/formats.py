"""Formats of rows. A format turns a row's fields into one Example."""

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from lola_ft.data.bad_rows import BadRows
from lola_ft.data.conversations import Message, conversation, read_conversation, read_tools, with_system
from lola_ft.data.example import UNKNOWN_LANGUAGE, Example, Exchange, Fields, is_learned, prompt_fields
from lola_ft.data.fields import checked_text, field_name, language_of, raw_field, text_field, unused_fields
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
    learn: str = "all_answers",
    findings: dict[str, Findings] | None = None,
) -> Iterator[Example]:
    """Yield the examples of all sources, in their order.

    Args:
        bad_rows: Collects the rows that cannot be used, which are then skipped; None raises an error for them.
        learn: `last_answer` learns only the last answer of a conversation, `all_answers` learns all.
        normalize: `nfc` composes characters (Unicode NFC); `none` changes nothing.
        findings: Filled with the findings on each source, by the source's name.

    Raises:
        DataError: A source cannot be read or, without `bad_rows`, a row cannot be used. It names file and line.
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
            example = last_answer_only(example) if learn == "last_answer" else example
            found.rows += 1
            found.unused.update(unused_fields(row))
            yield composed(example) if normalize == "nfc" else example
        if not usable and bad_rows is not None:
            raise DataError(f"{source.name}: no row can be used. The first problem: {bad_rows.first(source)}")


def to_example(row: Row, source: Source) -> Example:
    """Read a row in its source's format; raises DataError if a field is missing, empty, or of a wrong kind."""
    *earlier, (prompt, completion) = FORMATS[source.format].read(row, source)
    example = Example(prompt, completion, row_language(row, source), row.where, tuple(earlier))  # type: ignore[arg-type]
    if source.format == "messages":
        return replace(example, tools=read_tools(row, source))
    if source.format == "preference":
        return replace(example, rejected=read_rejected(row, source))
    if source.format == "unpaired_preference":
        return replace(example, desirable=read_label(row, source))
    if source.format == "translation":
        return replace(example, pair=read_pair(row, source))
    return example


def last_answer_only(example: Example) -> Example:
    """Return a conversation with only its last answer learned; the earlier answers are only read."""
    if example.prompt is not None and not is_learned(example.prompt):
        raise DataError(
            f"{example.where}: data.learn is last_answer, and the last answer has weight 0, so there is nothing to "
            "learn. Remove the row, or set data.learn to all_answers."
        )
    read = [{**fields, "reply": {**fields.get("reply", {}), "weight": 0}} for fields, _ in example.earlier]
    answers = [answer for _, answer in example.earlier]
    return replace(example, earlier=tuple(zip(read, answers, strict=True)))


def composed(example: Example) -> Example:
    """Return the example with every text in Unicode's form NFC."""
    earlier = tuple((_composed(fields), _nfc(answer)) for fields, answer in example.earlier)
    prompt = None if example.prompt is None else _composed(example.prompt)
    rejected = None if example.rejected is None else _nfc(example.rejected)
    pair = None if example.pair is None else alphabetical(*map(_nfc, example.pair))
    return replace(
        example, prompt=prompt, completion=_nfc(example.completion), earlier=earlier, rejected=rejected, pair=pair
    )


def _composed(fields: Fields) -> Fields:
    plain = {name: _nfc(value) if isinstance(value, str) else value for name, value in fields.items()}
    turns = [message | {"content": _nfc(message["content"])} for message in fields.get("messages", ())]
    return plain | {"messages": turns} if turns else plain


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _alpaca(row: Row, source: Source) -> list[Exchange]:
    """Read an instruction and its answer; with `system` or `history`, a conversation."""
    instruction = source.instruction or text_field(row, source, "instruction")
    given = text_field(row, source, "input", optional=True)
    answer, system = text_field(row, source, "output"), text_field(row, source, "system", optional=True)
    history = _history(row, source)
    if not system and not history:
        return [(prompt_fields(instruction, given), answer)]
    turns = [("user", prompt_fields(instruction, given)["prompt"]), ("assistant", answer)]
    for asked, said in reversed(history):
        turns = [("user", asked), ("assistant", said), *turns]
    messages: list[Message] = [{"role": role, "content": text} for role, text in turns]
    return conversation(with_system(messages, row, source), "the row", row.where)


def _history(row: Row, source: Source) -> list[tuple[str, str]]:
    """Return the earlier requests and answers of an Alpaca row as pairs."""
    given = raw_field(row, source, "history", optional=True)
    name = field_name(source, "history")
    if given in (None, "", []):
        return []
    if not isinstance(given, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in given):
        raise DataError(f"{row.where}: field '{name}' must be a list of pairs, each a request and its answer.")
    places = [(f"{name}[{place}]", pair) for place, pair in enumerate(given)]
    return [
        (checked_text(pair[0], place, row.where), checked_text(pair[1], place, row.where)) for place, pair in places
    ]


Reader = Callable[[Row, Source], list[Exchange] | list[tuple[None, str]]]


@dataclass(frozen=True)
class Format:
    """A format's standard fields, and the function that reads a row as exchanges (a text has None as prompt)."""

    fields: tuple[str, ...]
    read: Reader


_READERS: dict[str, Reader] = {
    "alpaca": _alpaca,
    "prompt_completion": read_answer,
    "text": lambda row, source: [(None, text_field(row, source, "text"))],
    "messages": read_conversation,
    "classification": lambda row, source: [read_classification(row, source)],
    "translation": lambda row, source: [read_translation(row, source)],
    "preference": read_chosen,
    "unpaired_preference": read_answer,
}
FORMATS = {name: Format(FORMAT_FIELDS[name], read) for name, read in _READERS.items()}


def row_language(row: Row, source: Source) -> str:
    """Return a row's language: the language column's value, the source's language, or the translation's target."""
    if source.language_column is not None:
        return language_of(row, source.language_column)
    if source.language is not None:
        return source.language
    return translation_language(row, source) if source.format == "translation" else UNKNOWN_LANGUAGE
