"""Formats `preference` and `unpaired_preference`: answers judged against each other, or each answer by itself.

An answer may be a text, a message of the assistant, a list with that message, or a whole conversation including the
prompt. The prompt may be a text or messages.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lola_ft.data.conversations import Message, content_text, conversation, messages_of, with_system
from lola_ft.data.example import Exchange, prompt_fields
from lola_ft.data.fields import field_name, raw_field, whole_number
from lola_ft.data.rows import Row, Source
from lola_ft.errors import DataError

_WORDS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def read_chosen(row: Row, source: Source) -> list[Exchange]:
    """Read the prompt and the chosen answer; raises DataError unless the rejected answer has the same prompt."""
    chosen, rejected = (_judged(row, source, field) for field in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1] or chosen[-1][0] != rejected[-1][0]:
        raise DataError(
            f"{row.where}: '{field_name(source, 'chosen')}' and '{field_name(source, 'rejected')}' answer different "
            "requests. Both must continue the same conversation."
        )
    if chosen[-1][1] == rejected[-1][1]:
        raise DataError(f"{row.where}: the chosen and the rejected answer are the same. Remove the row.")
    return chosen


def read_rejected(row: Row, source: Source) -> str:
    """Read the rejected answer."""
    return _judged(row, source, "rejected")[-1][1]


def read_answer(row: Row, source: Source) -> list[Exchange]:
    """Read the prompt and its single answer, which is judged or learned."""
    return _judged(row, source, "completion")


def read_label(row: Row, source: Source) -> bool:
    """Read the judgement of an answer (True: good); raises DataError if it is neither true nor false."""
    value = raw_field(row, source, "label")
    word = whole_number(str(value).strip().lower())
    if word not in _WORDS:
        name = field_name(source, "label")
        raise DataError(f"{row.where}: field '{name}' must be true (a good answer) or false; found {value!r}.")
    return _WORDS[word]


def _judged(row: Row, source: Source, field: str) -> list[Exchange]:
    """Return the exchanges that end with the answer in `field`."""
    name, prompt_name = field_name(source, field), field_name(source, "prompt")
    given = raw_field(row, source, field)
    answer = _messages(given, name, "assistant", row, source)
    whole = len(answer) > 1
    prompt = raw_field(row, source, "prompt", optional=whole)
    said = [] if prompt is None else _messages(prompt, prompt_name, "user", row, source)
    if whole:
        if not _begins(answer, said, isinstance(prompt, str)):
            raise DataError(
                f"{row.where}: field '{name}' is a whole conversation, and it does not begin with the row's "
                f"'{prompt_name}'. Map the right field, or remove the row."
            )
        return conversation(answer, name, row.where)
    plain = isinstance(prompt, str) and isinstance(given, str)
    if source.format == "prompt_completion":
        said = with_system(said, row, source)
        plain = plain and len(said) == 1
    exchanges = conversation([*said, *answer], f"{prompt_name} and {name}", row.where)
    return [(prompt_fields(said[0]["content"]), answer[0]["content"])] if plain else exchanges


def _messages(given: Any, name: str, role: str, row: Row, source: Source) -> list[Message]:
    """Return a text (also in parts) as one message of `role`; messages stay as they are."""
    if isinstance(given, Mapping) and given.keys() & {"role", "from"}:
        given = [given]
    if isinstance(given, list) and not _is_parts(given):
        return messages_of(given, name, row.where, replace(source, trim_last_turn=False))
    return [{"role": role, "content": content_text(given, f"field '{name}'", row.where)}]


def _is_parts(given: list[Any]) -> bool:
    """Tell whether a list is a text in parts rather than messages."""
    return all(isinstance(part, str) or (isinstance(part, Mapping) and "type" in part) for part in given)


def _begins(messages: list[Message], said: list[Message], is_text: bool) -> bool:
    """Tell whether a conversation begins with the prompt; a system message may precede a prompt given as text."""
    start = 1 if is_text and messages[0]["role"] == "system" else 0
    return messages[start : start + len(said)] == said
