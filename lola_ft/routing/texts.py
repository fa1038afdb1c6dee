"""The texts of a profile: files in many languages become pieces of token ids, each token exactly once."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lola_ft.data import Example, PromptTemplate, Source, encode_texts, files_of, read_examples
from lola_ft.data.formats import FORMATS
from lola_ft.data.text_files import UNITS
from lola_ft.errors import DataError
from lola_ft.row_formats import ROWS_OF_THEIR_OWN, kind_of_file

_BATCH = 256
# "sw", "sw_part_0", "zh_Hans", "pt-BR.train": the language code and, if there is one, the script after it.
_CODE = re.compile(r"^([a-z]{2,3}(?:[-_][A-Z][a-z]{3})?)(?:[-_.].*)?$")


@dataclass(frozen=True, slots=True)
class Piece:
    """A document's tokens, or a stretch of them if the document is longer than the model's positions."""

    language: str
    ids: list[int]


@dataclass
class Texts:
    """Reads sources piece by piece, and counts the tokens, bytes and documents read.

    Attributes:
        max_length: Most tokens per piece; a longer document becomes several pieces without overlap.
        max_tokens: Number of first tokens to read per language; None reads all.
        template: The template for formats with prompts.
    """

    sources: Sequence[Source]
    tokenizer: Any
    max_length: int
    max_tokens: int | None = None
    template: PromptTemplate | None = None
    tokens: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    documents: Counter[str] = field(default_factory=Counter)
    _read: int = 0  # sources read completely
    _bytes_read: int = 0  # bytes of these sources

    def __iter__(self) -> Iterator[Piece]:
        for source in self.sources:
            examples = read_examples([source])
            while not self._is_full(source.language) and (batch := list(islice(examples, _BATCH))):
                yield from self._pieces([example for example in batch if not self._is_full(example.language)])
            self._read, self._bytes_read = self._read + 1, self.bytes.total()

    @property
    def estimated_tokens(self) -> float:
        """The estimated tokens of all sources: the tokens so far, times the bytes of all files per byte read."""
        sizes = [Path(source.path).stat().st_size if source.path else 0 for source in self.sources]
        here = min(self.bytes.total() - self._bytes_read, *sizes[self._read : self._read + 1], sum(sizes))
        return self.tokens.total() * sum(sizes) / max(sum(sizes[: self._read]) + here, 1)

    def _pieces(self, batch: list[Example]) -> Iterator[Piece]:
        """Yield the pieces of a batch. Prompts and answers are tokenised separately, as in training."""
        prompted = [example for example in batch if example.prompt is not None]
        assert not prompted or self.template is not None, "a format with prompts needs a template"
        turns = iter(self.template.turns(prompted, self.tokenizer) if self.template and prompted else ())
        plain = [example.completion for example in batch if example.prompt is None]
        encoded = iter(encode_texts(plain, self.tokenizer))
        for example in batch:
            is_text = example.prompt is None
            ids = next(encoded) if is_text else [id for turn in next(turns) for id in (*turn.prompt, *turn.answer[:-1])]
            language = example.language
            room = len(ids) if self.max_tokens is None else self.max_tokens - self.tokens[language]
            kept = ids[:room]
            if not kept:
                continue
            self.tokens[language] += len(kept)
            self.documents[language] += 1
            exact = is_text and len(kept) == len(ids)
            self.bytes[language] += len(example.completion.encode()) if exact else self._bytes_of(kept)
            for start in range(0, len(kept), self.max_length):
                yield Piece(language, kept[start : start + self.max_length])

    def _bytes_of(self, ids: list[int]) -> int:
        """Return the bytes of a text's beginning, exact except for a character that is cut."""
        return len(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode())

    def _is_full(self, language: str | None) -> bool:
        return language is not None and self.max_tokens is not None and self.tokens[language] >= self.max_tokens


def sources_of(
    paths: Iterable[str | Path], format: str = "text", language_column: str | None = None, unit: str | None = None
) -> list[Source]:
    """Make one source per file; its language is in a column, or in the file's name."""
    for option, value, known in (("format", format, FORMATS), ("unit", unit or UNITS[0], UNITS)):
        if value not in known:
            raise DataError(f"--{option} {value}: is unknown; choose one of {', '.join(known)}.")
    files = [file for path in paths for file in files_of(str(path))]
    if unit is not None and all(kind_of_file(str(file)) in ROWS_OF_THEIR_OWN for file in files):
        raise DataError("--unit divides .txt files into texts, and no file is a .txt file. Leave it out.")
    return [
        Source(
            format=format,
            path=str(file),
            unit=unit,
            language=None if language_column else _language_of(file),
            language_column=language_column,
        )
        for file in files
    ]


def _language_of(file: Path) -> str:
    match = _CODE.match(file.stem)
    if match is None:
        raise DataError(
            f"{file}: its name does not begin with a language code, such as sw.txt or sw_part1.jsonl. Rename it, or "
            "name the field that holds the language with --language-column."
        )
    return match[1]
