"""Conversations: messages from other tools in one uniform spelling, cut into requests and answers.

Supported are OpenAI's and the Hub's `messages` (role, content), ShareGPT's `conversations` (from, value), contents as
text or as parts, tools and their results, and a `system` field beside the turns.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from lola_ft.data.example import Exchange, Fields, prompt_fields
from lola_ft.data.fields import checked_text, field_name, raw_field, text_field
from lola_ft.data.rows import Row, Source
from lola_ft.errors import DataError, in_words

Message = dict[str, Any]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "chatbot": "assistant",
    "model": "assistant", "ai": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
"""The meanings of role names, upper or lower case. A source's `roles` adds others."""

_KEYS = (("role", "content"), ("from", "value"))
THINKING = "reasoning_content"
"""The key of a model's reasoning before an answer; only chat templates that know the key write it."""
_BESIDE = ("tool_calls", THINKING)
"""Keys of an assistant's message beside its text, for chat templates that know them."""
_OF_TOOLS = ("tool_call_id", "name")


def read_conversation(row: Row, source: Source) -> list[Exchange]:
    """Read a row as exchanges: each is the messages since the last answer, and the answer."""
    name = field_name(source, "messages")
    messages = messages_of(raw_field(row, source, "messages"), name, row.where, source)
    return conversation(with_system(messages, row, source), name, row.where)


def read_tools(row: Row, source: Source) -> tuple[Mapping[str, Any], ...]:
    """Return the row's descriptions of tools: a list of objects, or such a list as JSON text."""
    given = raw_field(row, source, "tools", optional=True)
    if given is None or given == "" or given == []:
        return ()
    found = _parsed(given)
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise DataError(f"{row.where}: field '{field_name(source, 'tools')}' must be a list of objects, one per tool.")
    return tuple(found)


def with_system(messages: list[Message], row: Row, source: Source) -> list[Message]:
    """Return messages with the row's `system` field in front, if it has one."""
    system = text_field(row, source, "system", optional=True)
    if not system:
        return messages
    if messages[0]["role"] == "system":
        if messages[0]["content"].strip() == system.strip():
            return messages
        raise DataError(
            f"{row.where}: field '{field_name(source, 'system')}' and the first message are two system messages. Keep "
            "one of them."
        )
    return [{"role": "system", "content": system}, *messages]


def messages_of(given: Any, name: str, where: str, source: Source) -> list[Message]:
    """Return a field's messages with uniform roles and keys; raises DataError if it is not a list of messages.

    A list written as JSON text, as in tables, is read too.
    """
    listed = _parsed(given)
    if not isinstance(listed, list) or not listed:
        raise DataError(_no_messages(given, name, where))
    given = listed
    messages = [_message(item, f"{name}[{index}]", where, source.roles) for index, item in enumerate(given)]
    if source.trim_last_turn:
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
    if not messages:
        raise DataError(f"{where}: {name} holds no answer of the assistant, so there is nothing to learn.")
    return _joined(messages) if source.join_turns else messages


def _no_messages(given: Any, name: str, where: str) -> str:
    hint = ""
    if isinstance(given, str) and given.lstrip().startswith("["):
        hint = " It looks like a list in Python's notation, as pandas writes to CSV. Write the column with json.dumps."
    found = "an empty list" if given == [] else in_words(given)
    return f"{where}: field '{name}' must be a list of messages, each with role and content; found {found}.{hint}"


def conversation(messages: list[Message], name: str, where: str) -> list[Exchange]:
    """Cut messages into exchanges; raises DataError if they do not alternate, or no answer is last or learned."""
    _check_order(messages, name, where)
    exchanges, said = list[Exchange](), list[Message]()
    for message in messages:
        if message["role"] == "assistant":
            reply = {key: value for key, value in message.items() if key not in ("role", "content")}
            exchanges.append(({**_fields(said), **({"reply": reply} if reply else {})}, message["content"]))
            said = []
        else:
            said.append(message)
    if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        raise DataError(f"{where}: {name}: every answer has weight 0, so there is nothing to learn. Remove the row.")
    return exchanges


def content_text(given: Any, what: str, where: str) -> str:
    """Return a message's text; parts of kind `text` are joined without anything between them."""
    if not isinstance(given, list):
        return checked_text(given, what, where)
    texts = list[str]()
    for place, part in enumerate(given):
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text":
            raise DataError(f"{where}: {what}[{place}] is of kind '{kind}'; only text is supported. Remove the part.")
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise DataError(f"{where}: {what}[{place}] has no text.")
        texts.append(text)
    return checked_text("".join(texts), what, where)


def _message(item: Any, place: str, where: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: {place} must be an object with role and content; found {in_words(item)}.")
    role_key, content_key = next((keys for keys in _KEYS if keys[0] in item), _KEYS[0])
    role = _role(item.get(role_key), place, where, roles)
    if content_key not in item and not (item.get("tool_calls") or item.get("function_call")):
        raise DataError(f"{where}: {place} has no {content_key} (found: {', '.join(map(str, item))}).")
    content = item.get(content_key)
    if item.get("function_call") and not item.get("tool_calls"):  # OpenAI's earlier name for a single call
        item = {**item, "tool_calls": [{"function": item["function_call"]}]}
    extra = _beside(item, place, where, role)
    if "tool_calls" in extra and content in (None, "", []):
        return {"role": role, "content": "", **extra}
    return {"role": role, "content": content_text(content, f"{place}.{content_key}", where), **extra}


def _role(given: Any, place: str, where: str, roles: Mapping[str, str]) -> str:
    if given is None:
        raise DataError(f"{where}: {place} has no role. Give it one of system, user, assistant and tool.")
    role = roles.get(str(given)) or ROLES.get(str(given).strip().lower())
    if role is None:
        raise DataError(
            f"{where}: {place}: role {given!r} is unknown; the roles are system, user, assistant and tool, and common "
            f"other names of them. Say what it means with `roles: {{{given}: assistant}}` in the source."
        )
    return role


def _beside(item: Mapping[str, Any], place: str, where: str, role: str) -> Message:
    """Return a message's entries other than role and text."""
    if role != "assistant":
        return {key: item[key] for key in _OF_TOOLS if role == "tool" and item.get(key)}
    found: Message = {key: item[key] for key in _BESIDE if item.get(key)}
    if "tool_calls" in found:
        found["tool_calls"] = [_tool_call(call, place, where) for call in _listed(found["tool_calls"])]
    weight = item.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(f"{where}: {place}.weight is {weight}; it is 1 for an answer to learn and 0 for one to read.")
    return found | ({"weight": 0} if weight == 0 else {})


def _tool_call(call: Any, place: str, where: str) -> Message:
    """Return a tool call with its arguments as an object, as chat templates expect."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: {place}.tool_calls: each must be an object with the function's name and arguments.")
    return {**call, "type": "function", "function": {**function, "arguments": _parsed(function.get("arguments") or {})}}


def _listed(given: Any) -> Iterable[Any]:
    return given if isinstance(given, list) else [given]


def _parsed(given: Any) -> Any:
    """Return the value of JSON text; anything else unchanged."""
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given


def _joined(messages: list[Message]) -> list[Message]:
    """Return messages with consecutive turns of one role joined, a blank line between their texts."""
    joined = list[Message]()
    for message in messages:
        last = joined[-1] if joined else None
        if last and last["role"] == message["role"] != "tool" and last.get("weight") == message.get("weight"):
            text = "\n\n".join(part for part in (last["content"], message["content"]) if part)
            joined[-1] = last | message | {"content": text}
        else:
            joined.append(message)
    return joined


def _check_order(messages: list[Message], name: str, where: str) -> None:
    """Check the order: at most one system message, first; then user (or tool) and assistant in turn; answer last."""
    roles = [message["role"] for message in messages]
    start = 1 if roles[0] == "system" else 0
    for index, role in enumerate(roles[start:], start=start):
        if role == "system":
            raise DataError(f"{where}: {name}[{index}]: a system message must be the first one. Move or remove it.")
    for index, (before, after) in enumerate(pairwise(roles[start:]), start=start + 1):
        if before == after != "tool":
            raise DataError(
                f"{where}: {name}[{index}]: two {after} turns in a row. Join them (`join_turns: true` in the source "
                "does), or remove the row."
            )
        if after == "tool" and before == "user":
            raise DataError(f"{where}: {name}[{index}]: a tool's result without the assistant's call before it.")
    if roles[start:][:1] in (["assistant"], ["tool"]):
        raise DataError(f"{where}: {name}[{start}]: the {roles[start]} answers before the user has asked.")
    if roles[-1] != "assistant":
        raise DataError(
            f"{where}: {name} ends with the {roles[-1]}'s turn, so there is nothing to learn after it. Remove that "
            "turn (`trim_last_turn: true` in the source does)."
        )


def _fields(said: list[Message]) -> Fields:
    """Return the fields for a template: the messages, and their joined texts as instruction and prompt."""
    return prompt_fields("\n\n".join(message["content"] for message in said)) | {"messages": said}
