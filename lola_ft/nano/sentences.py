"""Cutting paragraphs into sentences of one or two lines, in any script.

Lengths are in bytes of UTF-8, so that a sentence carries about as many tokens in every script.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator

MIN_BYTES, MAX_BYTES = 60, 240
# After a mark that ends a sentence: before the next word, or at once where a script has no spaces between sentences.
_END = re.compile(r"(?<=[.!?;։؟۔।॥።၊။។༎])\s+|(?<=[。！？；])\s*")


def sentences_of(paragraphs: Iterable[str], least: int = MIN_BYTES, most: int = MAX_BYTES) -> Iterator[str]:
    """Yield the sentences of paragraphs; a long one in parts of about equal length, short ones not at all.

    Args:
        least, most: Bytes of a sentence. Parts are cut between words; where a script has no spaces, between characters.
    """
    for paragraph in paragraphs:
        for sentence in _END.split(" ".join(paragraph.split())):
            yield from (part for part in _parts(sentence, most) if least <= len(part.encode()))


def _parts(sentence: str, most: int) -> Iterator[str]:
    """Cut a sentence into as few parts as possible, none of more than `most` bytes."""
    count = -(-len(sentence.encode()) // most)
    goal = len(sentence.encode()) / max(count, 1)
    part = ""
    for word in _words(sentence, most):
        grown = len((part + word).encode())
        if part and (grown > most or len(part.encode()) >= goal):
            yield part.strip()
            part = ""
        part += word
    if part.strip():
        yield part.strip()


def _words(sentence: str, most: int) -> Iterator[str]:
    """Words with what separates them from the next; a text without spaces, as Thai or Japanese, by characters."""
    for word in re.findall(r"[^\s፡]*[\s፡]*", sentence):
        if len(word.encode()) > most // 3:
            yield from _characters(word)
        else:
            yield word


def _characters(word: str) -> Iterator[str]:
    """Characters with the marks that are written on them."""
    character = ""
    for char in word:
        if character and unicodedata.category(char)[0] != "M":
            yield character
            character = ""
        character += char
    yield character
