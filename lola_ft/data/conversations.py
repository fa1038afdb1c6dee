"""Format `messages`: a conversation of several turns, in which every answer of the assistant is learned."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from lola_ft.data.example import Exchange, Fields, prompt_fields
from lola_ft.data.fields import checked_text, field_name, raw_field
from lola_ft.data.rows import Row, Source
from lola_ft.errors import DataError

Message = dict[str, str]

_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names for the two."""


def read_conversation(row: Row, source: Source) -> list[Exchange]:
    """Cut a conversation into exchanges: what was said since the last answer, and the answer."""
    name = field_name(source, "messages")
    return conversation(messages_of(raw_field(row, source, "messages"), name, row.where), name, row.where)


def messages_of(given: Any, name: str, where: str) -> list[Message]:
    """Return a field's messages with one spelling of roles and keys; raises DataError if it is no list of messages."""
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: field '{name}' must be a list of messages, each with role and content.")
    return [_message(item, f"{name}[{index}]", where) for index, item in enumerate(given)]


def conversation(messages: list[Message], name: str, where: str) -> list[Exchange]:
    """Cut messages into exchanges; raises DataError if they are not in turn, or no answer is last."""
    _check_order(messages, name, where)
    exchanges, said = list[Exchange](), list[Message]()
    for message in messages:
        if message["role"] == "assistant":
            exchanges.append((_fields(said), message["content"]))
            said = []
        else:
            said.append(message)
    return exchanges


def _message(item: Any, place: str, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: {place} must be an object with role and content; found {type(item).__name__}.")
    role_key, content_key = next((keys for keys in _KEYS if keys[0] in item), _KEYS[0])
    role = item.get(role_key)
    role = _ROLES.get(str(role), role)
    if role not in ("system", "user", "assistant"):
        raise DataError(f"{where}: {place}: role must be system, user or assistant; found {role!r}.")
    if content_key not in item:
        raise DataError(f"{where}: {place} has no {content_key} (found: {', '.join(map(str, item))}).")
    return {"role": role, "content": checked_text(item[content_key], f"{place}.{content_key}", where)}


def _check_order(messages: list[Message], name: str, where: str) -> None:
    """System first if at all, then user and assistant in turn, an answer last."""
    roles = [message["role"] for message in messages]
    start = 1 if roles[0] == "system" else 0
    for index, role in enumerate(roles[start:], start=start):
        if role == "system":
            raise DataError(f"{where}: {name}[{index}]: a system message comes first or not at all.")
    for index, (before, after) in enumerate(pairwise(roles[start:]), start=start + 1):
        if before == after:
            raise DataError(f"{where}: {name}[{index}]: two {after} turns in a row. Join them, or remove the row.")
    if roles[start:][:1] == ["assistant"]:
        raise DataError(f"{where}: {name}[{start}]: the assistant answers before the user has asked.")
    if roles[-1] != "assistant":
        raise DataError(f"{where}: {name} ends with the {roles[-1]}'s turn, so there is nothing to learn after it.")


def _fields(said: list[Message]) -> Fields:
    """Return the fields that a template sees: the messages, and their joined texts as instruction and prompt."""
    return prompt_fields("\n\n".join(message["content"] for message in said)) | {"messages": said}
