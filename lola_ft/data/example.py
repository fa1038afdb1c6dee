"""One example, independent of its format: the text that the model reads and the text that it learns to write."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNKNOWN_LANGUAGE = "und"
"""The language code for 'undetermined' (ISO 639-2), used if a source names no language."""

Fields = Mapping[str, Any]
"""The fields that a template renders (see `prompt_fields`)."""

Exchange = tuple[Fields, str]
"""The fields before an answer, and the answer. `fields["reply"]` holds the answer message's other entries:
`tool_calls` and `reasoning_content` for templates that know them, and `weight` 0 if the answer is not learned."""


@dataclass(frozen=True, slots=True)
class Example:
    """One example: the text that the model reads and the text that it learns to write."""

    prompt: Fields | None
    """The fields before the completion; None if the whole text is learned."""
    completion: str
    language: str
    where: str
    earlier: tuple[Exchange, ...] = ()
    """The exchanges of a conversation before the last one; their answers are learned too."""
    rejected: str | None = None
    """The answer that `completion` was preferred to."""
    desirable: bool | None = None
    """The judgement of the completion (True: good); None if it was not judged by itself."""

    tools: tuple[Mapping[str, Any], ...] = ()
    """Descriptions of the tools that the assistant may call, as a chat template reads them."""

    pair: tuple[str, str] | None = None
    """A sentence and its translation in alphabetical order, so that both directions have the same pair."""

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """All exchanges in their order; none for a text."""
        return () if self.prompt is None else (*self.earlier, (self.prompt, self.completion))

    @property
    def request(self) -> str:
        """All text before the last answer, independent of the template; "" for a plain text."""
        if self.prompt is None:
            return ""
        before = (
            f"{len(fields['prompt'])}\n{fields['prompt']}\n{len(answer)}\n{answer}\n{_beside(fields)}"
            for fields, answer in self.earlier
        )
        tools = json.dumps(self.tools, sort_keys=True) if self.tools else ""
        return tools + "".join(before) + str(self.prompt["prompt"])

    @property
    def identity(self) -> str:
        """The row's content, equal for two rows exactly if they have the same prompt and answer."""
        beside = "" if self.prompt is None else _beside(self.prompt)
        said = f"{len(self.request)}\n{self.request}\n{self.completion}{beside}"
        judged = "" if self.rejected is None else f"\n{len(self.completion)}\n{self.rejected}"
        return said + judged + ("" if self.desirable is None else f"\n{self.desirable}")

    @property
    def split_key(self) -> str:
        """The text that decides the row's side of a split: its `identity`, or a translation's pair of sentences."""
        if self.pair is None:
            return self.identity
        one, other = self.pair
        return f"pair\n{len(one)}\n{one}\n{other}"


def messages_before(fields: Fields) -> list[dict[str, Any]]:
    """Return the messages since the last answer; a request without messages becomes one message of the user."""
    return list(fields.get("messages") or [{"role": "user", "content": fields["prompt"]}])


def reply_message(fields: Fields, answer: str) -> dict[str, Any]:
    """Return an answer as the assistant's message, with its tool calls."""
    beside = {key: value for key, value in fields.get("reply", {}).items() if key != "weight"}
    return {"role": "assistant", "content": answer} | beside


def is_learned(fields: Fields) -> bool:
    """Tell whether the answer after these fields is learned; otherwise it is only read."""
    return fields.get("reply", {}).get("weight", 1) != 0


def _beside(fields: Fields) -> str:
    """Return the answer message's other entries as text, for comparing rows; "" if it has none."""
    found = {key: value for key, value in fields.get("reply", {}).items() if key != "weight"}
    return json.dumps(found, sort_keys=True) if found else ""


def prompt_fields(instruction: str, input: str = "") -> dict[str, Any]:
    """Return the fields that every template may use: `instruction`, `input`, and `prompt`, which joins the two."""
    prompt = f"{instruction}\n\n{input}" if input else instruction
    return {"instruction": instruction, "input": input, "prompt": prompt}
