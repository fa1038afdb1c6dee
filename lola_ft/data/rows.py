"""Rows as readers yield them, each with its place in a file; rows that cannot be used; the source of rows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lola_ft.errors import DataError

BOM = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it was found, and its place: `file:line`, `file:[index]` or `dataset[split]:[index]`."""

    fields: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read, while those after it can; the message names its place."""

    message: str


Rows = Iterator[Row | BadRow]


def decode(data: bytes, where: str) -> str:
    """Decode UTF-8 text, or raise a DataError that says which byte is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if data.startswith(_UTF16_MARKS):
            raise DataError(f"{where}: the file is UTF-16, not UTF-8. Save it as UTF-8.") from None
        raise DataError(
            f"{where}: not UTF-8 text (byte {error.start + 1} is 0x{data[error.start]:02x}). Save the file as UTF-8."
        ) from None


@dataclass(frozen=True)
class Source:
    """One set of rows; the keys are those of a recipe's `data.sources`."""

    format: str
    path: str | None = None
    """A file, a folder (every file of a known kind in it, at any depth) or a glob such as `data/*.jsonl`."""
    hub: str | None = None
    subset: str | None = None
    split: str | None = None
    """Split of the Hub dataset; None is `train`."""
    revision: str | None = None
    streaming: bool = False
    limit: int | None = None
    """Rows that are read; None reads all."""
    unit: str | None = None
    """What a row of a .txt file is: `paragraph` (None too), `line` or `file`."""
    language: str | None = None
    language_column: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    """The format's field name: the file's field name."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Conversations: a role's name in the file: system, user, assistant or tool."""
    join_turns: bool = False
    """Conversations: neighbouring turns of one role become one."""
    trim_last_turn: bool = False
    """Conversations: last turns that no answer follows are left out."""
    labels: Mapping[str, str] | None = None
    """Classification: a label as the file has it: the word for it."""
    source_language: str | None = None
    target_language: str | None = None
    instruction: str | None = None
    """Classification and translation: the request, with the format's fields in braces. Alpaca: every row's request."""

    @property
    def name(self) -> str:
        """Return the source's name in messages: its path, or its Hub id and split."""
        if self.path is not None:
            return self.path
        return f"{self.hub}{f'/{self.subset}' if self.subset else ''}[{self.split or 'train'}]"
