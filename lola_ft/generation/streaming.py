"""Text at the terminal as it comes."""

import unicodedata
from typing import Any

from transformers import TextStreamer


class TerminalStreamer(TextStreamer):
    """Prints each token as soon as its characters are whole, in any script; nothing that could steer the terminal.

    transformers' own waits for a space, which some languages do not write.
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
        if text.endswith("\ufffd"):  # a character of which some bytes are still to come
            return
        self.on_finalized_text(text[self.print_len :])
        self.print_len = len(text)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(without_control_characters(text), stream_end)


def without_control_characters(text: str) -> str:
    """Text without characters that steer a terminal; line breaks and tabs stay."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) != "Cc" else char.encode("unicode_escape").decode()
        for char in text
    )
