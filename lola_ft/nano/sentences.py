"""Cutting paragraphs into sentences of one or two lines, in any script.

Lengths are in bytes of UTF-8, so that sentences have about the same number of tokens in every script.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator

MIN_BYTES, MAX_BYTES = 60, 240
# The end of a sentence: an end mark and spaces, or only the mark in scripts without spaces between sentences.
_END = re.compile(r"(?<=[.!?;։؟۔।॥።၊။។༎])\s+|(?<=[。！？；])\s*")


def sentences_of(paragraphs: Iterable[str], least: int = MIN_BYTES, most: int = MAX_BYTES) -> Iterator[str]:
    """Yield the sentences of paragraphs. Long sentences are cut into parts of equal length, short ones are left out.

    Args:
        least, most: Bytes of a sentence. Parts are cut between words or, in scripts without spaces, between characters.
    """
    for paragraph in paragraphs:
        for sentence in _END.split(" ".join(paragraph.split())):
            yield from (part for part in _parts(sentence, most) if least <= len(part.encode()))


def _parts(sentence: str, most: int) -> Iterator[str]:
    """Cut a sentence into as few parts of at most `most` bytes as possible."""
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
    """Yield words with the spaces after them; characters for text without spaces, such as Thai or Japanese."""
    for word in re.findall(r"[^\s፡]*[\s፡]*", sentence):
        if len(word.encode()) > most // 3:
            yield from _characters(word)
        else:
            yield word


def _characters(word: str) -> Iterator[str]:
    """Yield characters together with their combining marks."""
    character = ""
    for char in word:
        if character and unicodedata.category(char)[0] != "M":
            yield character
            character = ""
        character += char
    yield character
