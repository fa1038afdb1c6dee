"""The tokenizer's own chat template, which renders conversations as transformers and servers do.

A `chat_template` writes a whole conversation at once. To learn only the answers, the text is cut into stretches: the
text that the template writes up to the user's turn, with the generation prompt, is only read. The text that it writes
after that, up to the special token that ends the turn, is the answer:

    messages up to the user's turn    <|im_start|>user⏎Moja?<|im_end|>⏎<|im_start|>assistant⏎     read
    ... and the answer                One.<|im_end|>                                               learned

Each stretch is tokenised together with the end token of the turn before it, so that the ids are those of the whole
text. Some templates rewrite earlier answers when the conversation continues (Qwen3 removes their thinking). With such a
template only the last answer looks as the model should write it, so only the last answer is learned.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lola_ft.data.example import Example, is_learned, messages_before, reply_message
from lola_ft.data.prompt_template import Template
from lola_ft.data.turns import Turn, encode_texts, pattern_of, refuse_marks, special_tokens
from lola_ft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT = "chat"
"""The name of the tokenizer's own chat template in a recipe."""

_PROBE = ("What do you say?", "This is said.")


class _Stretch(NamedTuple):
    """A turn as text: the previous turn's end token, the text before the answer, the answer, and its end token."""

    before: str
    lead: str
    answer: str
    end: str
    learned: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template; transformers runs its jinja `source` in a sandbox."""

    source: str
    name = CHAT
    renders_turns = True

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast") -> "ChatTemplate | None":
        """Return a tokenizer's chat template (the one named `default` if there are several), or None."""
        found = getattr(tokenizer, "chat_template", None)
        if isinstance(found, dict):
            found = found.get("default")
        return cls(found) if found else None

    def turns(self, examples: list[Example], tokenizer: "PreTrainedTokenizerFast") -> list[list[Turn]]:
        """Return the turns of examples (all with prompts) as token ids.

        If the template rewrites earlier answers, there are fewer turns than answers: those answers are in the prompt.

        Raises:
            DataError: The template refuses a conversation, drops a message, or ends an answer without a special token.
        """
        rows = [self._stretches(example, tokenizer) for example in examples]
        found = iter(_encoded([stretch for row in rows for stretch in row], tokenizer))
        return [[next(found) for _ in row] for row in rows]

    def prompt_ids(self, example: Example, tokenizer: "PreTrainedTokenizerFast") -> list[int]:
        """Return the token ids of everything before an example's last answer."""
        *earlier, last = self._stretches(example, tokenizer, is_open=True)
        before = [token for turn in _encoded(earlier, tokenizer) for token in (*turn.prompt, *turn.answer)]
        [ids] = encode_texts([last.before + last.lead], tokenizer, with_marks=True)
        return [*before, *ids[bool(last.before) :]]

    def end_of(self, tokenizer: "PreTrainedTokenizerFast") -> int:
        """Return the id of the token that ends an answer; raises DataError if the template ends it without one."""
        asked, said = (
            {"role": role, "content": text} for role, text in zip(("user", "assistant"), _PROBE, strict=True)
        )
        lead = self._render([asked], None, tokenizer, True, "")
        whole = self._render([asked, said], None, tokenizer, False, "")
        return special_tokens(tokenizer)[_answer_and_end(whole, lead, _PROBE[1], tokenizer, "")[1]]

    def _stretches(self, example: Example, tokenizer: Any, is_open: bool = False) -> list[_Stretch]:
        refuse_marks(_said(example), pattern_of(special_tokens(tokenizer)), example.where)
        messages, stretches = list[dict[str, Any]](), list[_Stretch]()
        written = end = ""
        for place, (fields, answer) in enumerate(example.exchanges, start=1):
            messages += messages_before(fields)
            lead = self._render(messages, example.tools, tokenizer, True, example.where)
            self._refuse_loss(messages, example, lead)
            if not lead.startswith(written):
                stretches, written, end = [], "", ""
            if is_open and place == len(example.exchanges):
                stretches.append(_Stretch(end, lead[len(written) :], "", "", True))
                break
            messages.append(reply_message(fields, answer))
            whole = self._render(messages, example.tools, tokenizer, False, example.where)
            text, mark = _answer_and_end(whole, lead, answer, tokenizer, example.where)
            stretches.append(_Stretch(end, lead[len(written) :], text, mark, is_learned(fields)))
            written, end = lead + text + mark, mark
        return stretches

    def _render(self, messages: list[dict[str, Any]], tools: Any, tokenizer: Any, is_open: bool, where: str) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.source, tokenize=False, add_generation_prompt=is_open
            )
        except Exception as error:  # a template may raise anything
            place = f"{where}: " if where else ""
            raise DataError(f"{place}the tokenizer's chat template fails: {str(error).rstrip('.')}.") from None

    def _refuse_loss(self, messages: list[dict[str, Any]], example: Example, written: str) -> None:
        """Refuse a conversation if the template leaves out a message to the assistant, a tool call, or the tools."""
        for place, message in enumerate(messages):
            if message["role"] != "assistant" and message["content"].strip() not in written:
                raise DataError(
                    f"{example.where}: the tokenizer's chat template leaves out the {message['role']}'s message "
                    f"(number {place + 1}). Remove it from the row, or choose another data.template."
                )
            for call in message.get("tool_calls", ()):
                if call.get("function", {}).get("name", "") not in written:
                    raise DataError(
                        f"{example.where}: the tokenizer's chat template leaves out tool calls. {_NO_TOOLS}"
                    )
        for tool in example.tools or ():
            if tool.get("function", tool).get("name", "") not in written:
                raise DataError(f"{example.where}: the tokenizer's chat template leaves out `tools`. {_NO_TOOLS}")


_NO_TOOLS = "Choose a base whose template supports them, or remove them from the rows."

PromptTemplate = Template | ChatTemplate
"""The writer of prompts: a bundled template, the user's own template, or the tokenizer's chat template."""


def check_template(name: str) -> None:
    """Raise DataError if a template cannot be loaded, as far as that can be checked without a tokenizer."""
    if name != CHAT:
        Template.load(name)


def load_template(name: str, tokenizer: "PreTrainedTokenizerFast") -> PromptTemplate:
    """Load a template by its name in a recipe; `chat` is the tokenizer's own chat template.

    Raises:
        DataError: No such template, a broken one, or a tokenizer without a chat template.
    """
    if name != CHAT:
        return Template.load(name)
    found = ChatTemplate.of(tokenizer)
    if found is None:
        raise DataError(
            "template 'chat' is the tokenizer's own chat template, and this tokenizer has none. Choose chatml, or "
            "another template."
        )
    return found


def _encoded(stretches: list[_Stretch], tokenizer: Any) -> list[Turn]:
    """Return stretches as token ids. If a token would span lead and answer, the two are tokenised separately."""
    leads = [part.before + part.lead for part in stretches]
    wholes = [lead + part.answer + part.end for lead, part in zip(leads, stretches, strict=True)]
    lead_ids, whole_ids = (encode_texts(texts, tokenizer, with_marks=True) for texts in (leads, wholes))
    turns = list[Turn]()
    for part, lead, whole in zip(stretches, lead_ids, whole_ids, strict=True):
        answer = whole[len(lead) :]
        if whole[: len(lead)] != lead:  # at inference the lead is tokenised before there is an answer
            [answer] = encode_texts([part.answer + part.end], tokenizer, with_marks=True)
        turns.append(Turn(lead[bool(part.before) :], answer, part.answer, part.learned))
    return turns


def _answer_and_end(whole: str, lead: str, said: str, tokenizer: Any, where: str) -> tuple[str, str]:
    """Return the answer as the template wrote it after the lead, without its end token, and the end token."""
    place = f"{where}: " if where else ""
    if not whole.startswith(lead):
        raise DataError(
            f"{place}the tokenizer's chat template begins an answer differently from its generation prompt, so the "
            "model would learn a prompt that it never gets. Use a template of your own."
        )
    tail = whole[len(lead) :]
    said = said.strip()
    found = tail.rfind(said) if said else -1
    marks = list(pattern_of(special_tokens(tokenizer)).finditer(tail, found + len(said) if found >= 0 else 0))
    if not marks:
        raise DataError(
            f"{place}the tokenizer's chat template ends an answer without a special token, so generation would not "
            "stop there. Choose chatml or another template, which end answers with the end-of-text token."
        )
    mark = marks[0] if found >= 0 else marks[-1]
    return tail[: mark.start()], mark[0]


def _said(example: Example) -> dict[str, str]:
    messages = [message for fields, answer in example.exchanges for message in _all_messages(fields, answer)]
    return {f"message {place}": message["content"] for place, message in enumerate(messages, start=1)}


def _all_messages(fields: Any, answer: str) -> list[dict[str, Any]]:
    return [*messages_before(fields), reply_message(fields, answer)]
