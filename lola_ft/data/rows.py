"""Rows as readers yield them, each with its place in a file, and rows that cannot be used."""

from collections.abc import Iterator
from dataclasses import dataclass
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
    """UTF-8 text.

    Raises:
        DataError: Saying which byte is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if data.startswith(_UTF16_MARKS):
            raise DataError(f"{where}: the file is UTF-16, not UTF-8. Save it as UTF-8.") from None
        raise DataError(
            f"{where}: not UTF-8 text (byte {error.start + 1} is 0x{data[error.start]:02x}). Save the file as UTF-8."
        ) from None
