"""Prompts in the form of a model's training: written by its template and tokenised as in training."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lola_ft.data import ChatTemplate, Example, PromptTemplate, Row, Source, Template, load_template, read_rows
from lola_ft.data.conversations import read_conversation
from lola_ft.data.example import UNKNOWN_LANGUAGE, Exchange, Fields, prompt_fields
from lola_ft.data.fields import checked_text, found_fields
from lola_ft.data.json_files import object_lines
from lola_ft.data.source_rows import usable
from lola_ft.data.text_lines import decode
from lola_ft.errors import DataError
from lola_ft.open_model import OpenModel, PromptReader
from lola_ft.row_formats import kind_of_file

ADDED = ("answer", "ended", "tokens")
"""The fields that an output line adds to the row's own fields."""


@dataclass(frozen=True)
class Asked:
    """One request of a file.

    Attributes:
        row: The request's own fields.
        example: The request as an example, with an empty completion.
    """

    row: dict[str, Any]
    example: Example


def request(fields: Fields, where: str = "The prompt", earlier: Sequence[Exchange] = ()) -> Example:
    """Return a request as an example without an answer."""
    return Example(fields, "", UNKNOWN_LANGUAGE, where, tuple(earlier))


STANDARD_INPUT = "-"


def prompt_from_standard_input() -> str:
    """Read a prompt: all of standard input, without the line break at its end."""
    return decode(sys.stdin.buffer.read(), "standard input").removesuffix("\n").removesuffix("\r")


def read_prompts(path: str) -> list[Asked]:
    """Read the requests of a .txt file (one per line), of a .jsonl file (one per object) or of standard input (`-`).

    An object has `prompt`, or `instruction` and optionally `input`, or `messages` that end with the user's.

    Raises:
        DataError: A request cannot be read; the message names file and line.
    """
    rows: Iterable[Row]
    if path == STANDARD_INPUT:
        given = sys.stdin.buffer.read()
        lines = not given.lstrip().startswith(b"{")
        rows = _rows_of_input(given, lines)
    elif (kind := kind_of_file(path)) in (".txt", ".jsonl", ".ndjson"):
        lines = kind == ".txt"
        rows = read_rows(Source("text", path=path, unit="line" if lines else None))
    else:
        raise DataError(
            f"{path}: prompts must be in a .txt file (one per line) or a .jsonl file (one object per line)."
        )
    return [Asked(row.fields, _request(row, "text" if lines else "prompt")) for row in rows]


def _rows_of_input(given: bytes, lines: bool) -> Iterator[Row]:
    """Yield the rows of standard input, which are lines of text or objects."""
    numbered, name = enumerate(given.splitlines(), start=1), "standard input"
    if lines:
        rows = [Row({"text": decode(line, f"{name}:{number}")}, f"{name}:{number}") for number, line in numbered]
        yield from (row for row in rows if row.fields["text"].strip())
    else:
        yield from map(usable, object_lines(name, numbered))


def _request(row: Row, prompt: str) -> Example:
    fields, where = row.fields, row.where
    if taken := [name for name in ADDED if name in fields]:
        raise DataError(f"{where}: the answer would overwrite the field '{taken[0]}'. Rename it.")
    if prompt in fields:
        return request(prompt_fields(checked_text(fields[prompt], f"field '{prompt}'", where)), where)
    if "instruction" in fields:
        instruction = checked_text(fields["instruction"], "field 'instruction'", where)
        given = fields.get("input")
        return request(prompt_fields(instruction, checked_text(given, "field 'input'", where) if given else ""), where)
    if isinstance(fields.get("messages"), list):
        return _open_conversation(row)
    raise DataError(f"{where}: has no field prompt, instruction or messages (found: {found_fields(row)}).")


def _open_conversation(row: Row) -> Example:
    """Read a conversation that lacks its last answer like training data, by adding a placeholder answer."""
    messages = [*row.fields["messages"], {"role": "assistant", "content": "?"}]
    *earlier, (last, _) = read_conversation(Row({"messages": messages}, row.where), Source("messages"))
    return request(last, row.where, earlier)


def template_of(
    opened: OpenModel | PromptReader, given: str | None, others: PromptTemplate | None = None
) -> PromptTemplate:
    """Return the template for a model's prompts: the given one, else the one that it was trained with.

    A base was trained with none. It gets `others`, else its tokenizer's chat template, else `plain`; a line is printed.

    Args:
        given: A template's name, as in a recipe.
        others: The template of the models that a base is compared with, so that all models read the same prompts.
    """
    if given:
        return load_template(given, opened.tokenizer)
    if opened.template:
        return opened.template
    found = others or ChatTemplate.of(opened.tokenizer)
    how = "without a template (plain)" if found is None else "with its tokenizer's chat template"
    how = how if others is None else "with the template that the other models were trained with"
    print(f"{opened.subject.name} has no prompt template, so prompts are written {how}.", file=sys.stderr)
    return found or Template.load("plain")
