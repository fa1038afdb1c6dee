"""Rows of .txt files: documents, each with the one field `text`."""

from collections.abc import Callable, Iterator
from pathlib import Path

from lola_ft.data.rows import BOM, BadRow, Row, Rows, decode
from lola_ft.errors import DataError


def text_rows(path: Path, unit: str = "paragraph") -> Rows:
    """The documents of a file.

    Args:
        unit: What a document is: a `paragraph` (blank lines divide them, other line breaks stay), a `line`, or the
            whole `file`.
    """
    with path.open("rb") as file:
        for number, lines in _READERS[unit](file):
            where = f"{path}:{number}"
            try:
                text = decode(lines, where).replace("\r\n", "\n").strip("\n")
            except DataError as error:
                yield BadRow(str(error))
                continue
            if text.strip():
                yield Row({"text": text}, where)


Units = Iterator[tuple[int, bytes]]


def _paragraphs(file: Iterator[bytes]) -> Units:
    """Runs of lines that are not blank, each with the number of its first line."""
    first, lines = 0, list[bytes]()
    for number, line in _lines(file):
        if line.strip():
            first = first if lines else number
            lines.append(line)
        elif lines:
            yield first, b"".join(lines)
            lines = []
    if lines:
        yield first, b"".join(lines)


def _lines(file: Iterator[bytes]) -> Units:
    for number, line in enumerate(file, start=1):
        yield number, line.removeprefix(BOM) if number == 1 else line


def _whole(file: Iterator[bytes]) -> Units:
    yield 1, b"".join(file).removeprefix(BOM)


_READERS: dict[str, Callable[[Iterator[bytes]], Units]] = {"paragraph": _paragraphs, "line": _lines, "file": _whole}
UNITS = tuple(_READERS)
