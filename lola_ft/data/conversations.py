"""Conversations: messages of others' tools, in one spelling, cut into requests and answers.

Rows come as OpenAI's and the Hub's `messages` (role, content), as ShareGPT's `conversations` (from, value), with
contents as text or as parts, with tools and their results, with a `system` field beside the turns.
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
"""Names of roles, in any capitals, and what they mean here. A source's `roles` adds others."""

_KEYS = (("role", "content"), ("from", "value"))
THINKING = "reasoning_content"
"""What a model thought before an answer; only a chat template that knows it writes it."""
_BESIDE = ("tool_calls", THINKING)
"""What an assistant's message may hold beside its text, for chat templates that know it."""
_OF_TOOLS = ("tool_call_id", "name")


def read_conversation(row: Row, source: Source) -> list[Exchange]:
    """Cut a conversation into exchanges: what was said since the last answer, and the answer."""
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
    """Return a field's messages with one spelling of roles and keys; raises DataError if it is no list of messages.

    A list as JSON text, which tables hold, is read too.
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
        hint = " It looks like Python's own notation, as pandas writes lists to CSV: write the column with json.dumps."
    found = "an empty list" if given == [] else in_words(given)
    return f"{where}: field '{name}' must be a list of messages, each with role and content; found {found}.{hint}"


def conversation(messages: list[Message], name: str, where: str) -> list[Exchange]:
    """Cut messages into exchanges; raises DataError if they are not in turn, or no answer is last or learned."""
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
    """Return a message's text: a text, or parts of kind `text`, which follow each other without anything between."""
    if not isinstance(given, list):
        return checked_text(given, what, where)
    texts = list[str]()
    for place, part in enumerate(given):
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text":
            raise DataError(f"{where}: {what}[{place}] is of kind '{kind}'; this version reads text. Remove the part.")
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
            f"{where}: {place}: role {given!r} is unknown; there are system, user, assistant and tool, and common "
            f"other names of them. Say which it is with `roles: {{{given}: assistant}}` in the source."
        )
    return role


def _beside(item: Mapping[str, Any], place: str, where: str, role: str) -> Message:
    """Return what a message holds beside its text."""
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
    """Return a tool call with its arguments as an object, which is what chat templates write."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: {place}.tool_calls: each must be an object with the function's name and arguments.")
    return {**call, "type": "function", "function": {**function, "arguments": _parsed(function.get("arguments") or {})}}


def _listed(given: Any) -> Iterable[Any]:
    return given if isinstance(given, list) else [given]


def _parsed(given: Any) -> Any:
    """Return what JSON text says; anything else as it is."""
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given


def _joined(messages: list[Message]) -> list[Message]:
    """Return messages with neighbours of one role as one, a blank line between their texts."""
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
    """System first if at all, then user (or tools) and assistant in turn, an answer last."""
    roles = [message["role"] for message in messages]
    start = 1 if roles[0] == "system" else 0
    for index, role in enumerate(roles[start:], start=start):
        if role == "system":
            raise DataError(f"{where}: {name}[{index}]: a system message comes first or not at all.")
    for index, (before, after) in enumerate(pairwise(roles[start:]), start=start + 1):
        if before == after != "tool":
            raise DataError(
                f"{where}: {name}[{index}]: two {after} turns in a row. Join them (`join_turns: true` in the source "
                "does), or remove the row."
            )
        if after == "tool" and before == "user":
            raise DataError(f"{where}: {name}[{index}]: a tool's result without a call of the assistant before it.")
    if roles[start:][:1] in (["assistant"], ["tool"]):
        raise DataError(f"{where}: {name}[{start}]: the {roles[start]} answers before the user has asked.")
    if roles[-1] != "assistant":
        raise DataError(
            f"{where}: {name} ends with the {roles[-1]}'s turn, so there is nothing to learn after it. Remove that "
            "turn (`trim_last_turn: true` in the source does)."
        )


def _fields(said: list[Message]) -> Fields:
    """Return the fields that a template sees: the messages, and their joined texts as instruction and prompt."""
    return prompt_fields("\n\n".join(message["content"] for message in said)) | {"messages": said}
