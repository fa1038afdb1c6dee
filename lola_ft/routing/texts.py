"""The texts of a profile: files in many languages to pieces of token ids, each token once."""

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
# "sw", "sw_part_0", "zh_Hans", "pt-BR.train": the code and, if it is one, the script behind it.
_CODE = re.compile(r"^([a-z]{2,3}(?:[-_][A-Z][a-z]{3})?)(?:[-_.].*)?$")


@dataclass(frozen=True, slots=True)
class Piece:
    """A document's tokens, or a stretch of them where it is longer than the model reads at a time."""

    language: str
    ids: list[int]


@dataclass
class Texts:
    """Reads sources piece by piece, and counts what it gave.

    Attributes:
        max_length: A longer document becomes several pieces, one after the other without overlap.
        max_tokens: Tokens of each language, the first of its files; None takes all.
        template: Renders the prompts of formats that have them.
    """

    sources: Sequence[Source]
    tokenizer: Any
    max_length: int
    max_tokens: int | None = None
    template: PromptTemplate | None = None
    tokens: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    documents: Counter[str] = field(default_factory=Counter)
    _read: int = 0  # sources that are done
    _bytes_read: int = 0  # of their texts

    def __iter__(self) -> Iterator[Piece]:
        for source in self.sources:
            examples = read_examples([source])
            while not self._is_full(source.language) and (batch := list(islice(examples, _BATCH))):
                yield from self._pieces([example for example in batch if not self._is_full(example.language)])
            self._read, self._bytes_read = self._read + 1, self.bytes.total()

    @property
    def estimated_tokens(self) -> float:
        """Estimate the tokens of all sources: those given so far, times the bytes of all files per byte read."""
        sizes = [Path(source.path).stat().st_size if source.path else 0 for source in self.sources]
        here = min(self.bytes.total() - self._bytes_read, *sizes[self._read : self._read + 1], sum(sizes))
        return self.tokens.total() * sum(sizes) / max(sum(sizes[: self._read]) + here, 1)

    def _pieces(self, batch: list[Example]) -> Iterator[Piece]:
        """Pieces of a batch. Prompts and answers are tokenised apart, as in training."""
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
        """Bytes of a text's beginning; exact but for a character that the cut falls into."""
        return len(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode())

    def _is_full(self, language: str | None) -> bool:
        return language is not None and self.max_tokens is not None and self.tokens[language] >= self.max_tokens


def sources_of(
    paths: Iterable[str | Path], format: str = "text", language_column: str | None = None, unit: str | None = None
) -> list[Source]:
    """Make a source of each file of the paths; its language is in a column, or in the file's name."""
    for option, value, known in (("format", format, FORMATS), ("unit", unit or UNITS[0], UNITS)):
        if value not in known:
            raise DataError(f"--{option} {value}: there is {', '.join(known)}.")
    files = [file for path in paths for file in files_of(str(path))]
    if unit is not None and all(kind_of_file(str(file)) in ROWS_OF_THEIR_OWN for file in files):
        raise DataError("--unit divides .txt files, and there is none. Leave it out.")
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
            f"{file}: its name does not begin with a language code, as sw.txt or sw_part1.jsonl do. Rename it, or name "
            "the field that holds the language with --language-column."
        )
    return match[1]
