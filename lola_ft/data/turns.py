"""Turns as token ids: the prompt, and the answer with the token that ends it."""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lola_ft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Turn(NamedTuple):
    """One exchange of a row as token ids.

    Attributes:
        prompt: The ids before the answer; empty for a plain text.
        answer: The ids of the answer or text, with the end token last.
        text: The answer as text, without the end token.
        learned: True if the answer is learned, False if it is only read.
    """

    prompt: list[int]
    answer: list[int]
    text: str
    learned: bool = True


def encode_texts(texts: list[str], tokenizer: "PreTrainedTokenizerFast", with_marks: bool = False) -> list[list[int]]:
    """Return the token ids of texts, without the tokens that the tokenizer can add around a text.

    Args:
        with_marks: Read a special token's text as the token. Otherwise `<s>` in a text is three characters.
    """
    options = {"add_special_tokens": False, "split_special_tokens": not with_marks}
    return tokenizer(texts, **options, return_attention_mask=False, verbose=False)["input_ids"] if texts else []


def eos_of(tokenizer: Any) -> int:
    """Return the id of the tokenizer's end-of-text token; raises DataError if it has none."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, so answers would never end. Set its eos_token.")
    return tokenizer.eos_token_id


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the ids of the tokenizer's special tokens, by their text. Only a template may write them."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = {word: tokenizer.convert_tokens_to_ids(word) for word in tokenizer.all_special_tokens}
    return added | named


def pattern_of(marks: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the marks, longer marks first."""
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or "(?!)")


def refuse_marks(said: Mapping[str, str], marks: re.Pattern[str], where: str) -> None:
    """Raise DataError if a text contains the text of a special token, which would be read as the token.

    Args:
        said: The texts by their place in the row, such as `messages[1]`.
    """
    for place, text in said.items():
        if found := marks.search(text):
            raise DataError(
                f"{where}: {place} holds {found[0]}, which the tokenizer reads as a special token. Remove it "
                "from the text, or set data.on_bad_row to skip."
            )
