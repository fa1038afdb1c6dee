"""Conversations at the terminal, with answers printed token by token."""

import sys
import unicodedata
from collections.abc import Callable
from typing import Any

from transformers import TextStreamer

from lola_ft.data import PromptTemplate
from lola_ft.data.example import Exchange, Fields, prompt_fields
from lola_ft.errors import UserError
from lola_ft.families import architecture_of
from lola_ft.generation.answers import Answer, Sampling, answer_one, check_room
from lola_ft.generation.prompts import request

HELP = "Write a line. /new starts a new conversation; /end or Ctrl-D quits."


def chat(
    model: Any,
    tokenizer: Any,
    template: PromptTemplate,
    sampling: Sampling,
    read: Callable[[str], str] = input,
    answer: Callable[..., Answer] = answer_one,
) -> None:
    """Hold a conversation until the user ends it; raises UserError for a template of single requests."""
    if not template.renders_turns:
        raise UserError(
            f"Template {template.name} renders only single requests, so in a conversation the model would "
            "not see earlier turns. Use --prompt, or a model that was trained with chatml (or another template that "
            "uses `messages`)."
        )
    end = template.end_of(tokenizer)
    print(HELP, file=sys.stderr)
    said = list[Exchange]()
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            return
        if line == "/end":
            return
        if line == "/new":
            said = []
        elif line:
            fields = prompt_fields(line) | {"messages": [{"role": "user", "content": line}]}
            positions = architecture_of(model.config).sizes.positions
            said, ids = _fitting(said, fields, template, tokenizer, positions, sampling)
            given = answer(model, tokenizer, ids, sampling, TerminalStreamer(tokenizer), end)
            if not given.ended:
                print(f"(cut after {given.tokens} tokens)", file=sys.stderr)
            said = [*said, (fields, given.text)]


def _fitting(
    said: list[Exchange], fields: Fields, template: PromptTemplate, tokenizer: Any, positions: int, sampling: Sampling
) -> tuple[list[Exchange], list[int]]:
    """Return the latest exchanges that leave room for an answer, and the token ids of the whole prompt."""
    for forgotten in range(len(said) + 1):
        kept = said[forgotten:]
        ids = template.prompt_ids(request(fields, earlier=kept), tokenizer)
        if len(ids) + sampling.max_new_tokens <= positions:
            break
    check_room(ids, positions, "The line")
    if forgotten:
        print(f"(the first {forgotten} exchanges are left out: the model has {positions} positions)", file=sys.stderr)
    return kept, ids


class TerminalStreamer(TextStreamer):
    """A streamer that prints each token as soon as its characters are complete, without control characters.

    transformers' own streamer waits for a space, which some languages do not write.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.next_tokens_are_prompt: bool = True
        self.print_len: int = 0

    def put(self, value: Any) -> None:
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.token_cache.extend(value.flatten().tolist())
        text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)
        if text.endswith("\ufffd"):  # a character whose last bytes are in the next tokens
            return
        self.on_finalized_text(text[self.print_len :])
        self.print_len = len(text)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(without_control_characters(text), stream_end)


def without_control_characters(text: str) -> str:
    """Return text with control characters escaped, except line breaks and tabs."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) != "Cc" else char.encode("unicode_escape").decode()
        for char in text
    )
