"""Prompts as a model learned to read them: written by its template, tokenised as in training."""

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
"""What an output line has beside the row's own fields."""


@dataclass(frozen=True)
class Asked:
    """One request of a file.

    Attributes:
        row: The fields that it came with.
        example: Its completion is not known, and empty.
    """

    row: dict[str, Any]
    example: Example


def request(fields: Fields, where: str = "The prompt", earlier: Sequence[Exchange] = ()) -> Example:
    """An example whose answer is to come."""
    return Example(fields, "", UNKNOWN_LANGUAGE, where, tuple(earlier))


STANDARD_INPUT = "-"


def prompt_from_standard_input() -> str:
    """Read a prompt: all that comes, without the line break at its end."""
    return decode(sys.stdin.buffer.read(), "standard input").removesuffix("\n").removesuffix("\r")


def read_prompts(path: str) -> list[Asked]:
    """The requests of a .txt file, one a line, or of a .jsonl file, one an object; `-` is standard input, of either.

    An object has `prompt`; or `instruction` and perhaps `input`; or `messages`, the last one the user's.

    Raises:
        DataError: Naming file and line.
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
        raise DataError(f"{path}: prompts are read from .txt (one a line) or .jsonl (one an object).")
    return [Asked(row.fields, _request(row, "text" if lines else "prompt")) for row in rows]


def _rows_of_input(given: bytes, lines: bool) -> Iterator[Row]:
    """Rows of standard input: lines of text, or objects."""
    numbered, name = enumerate(given.splitlines(), start=1), "standard input"
    if lines:
        rows = [Row({"text": decode(line, f"{name}:{number}")}, f"{name}:{number}") for number, line in numbered]
        yield from (row for row in rows if row.fields["text"].strip())
    else:
        yield from map(usable, object_lines(name, numbered))


def _request(row: Row, prompt: str) -> Example:
    fields, where = row.fields, row.where
    if taken := [name for name in ADDED if name in fields]:
        raise DataError(f"{where}: field '{taken[0]}' would be overwritten by the answer's. Rename it.")
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
    """Read a conversation without its last answer as training does, by adding a placeholder answer."""
    messages = [*row.fields["messages"], {"role": "assistant", "content": "?"}]
    *earlier, (last, _) = read_conversation(Row({"messages": messages}, row.where), Source("messages"))
    return request(last, row.where, earlier)


def template_of(
    opened: OpenModel | PromptReader, given: str | None, others: PromptTemplate | None = None
) -> PromptTemplate:
    """The template to talk to a model with: the given one, or the one it was trained with.

    Args:
        given: A template's name, as in a recipe.
        others: Of the models that it is compared with: a base has none, and gets this one, so that all read the same.
            Without one, its tokenizer's chat template; without that, `plain`.
    """
    if given:
        return load_template(given, opened.tokenizer)
    if opened.template:
        return opened.template
    found = others or ChatTemplate.of(opened.tokenizer)
    how = "as they are (plain)" if found is None else "by its tokenizer's chat template"
    how = how if others is None else "by the template that the others were trained with"
    print(f"{opened.subject.name} has no prompt template: prompts are given {how}.", file=sys.stderr)
    return found or Template.load("plain")
