"""Rows of .txt files: documents with the single field `text`."""

from collections.abc import Callable, Iterator
from pathlib import Path

from lola_ft.data.rows import BadRow, Findings, Row, Rows, Source
from lola_ft.data.text_lines import decode, lines_of
from lola_ft.errors import DataError


def text_rows(path: Path, source: Source, findings: Findings) -> Rows:  # noqa: ARG001 - every reader has this signature
    """Read the documents of a file.

    The source's `unit` decides what a document is: a `paragraph` (the default; blank lines divide paragraphs, other
    line breaks stay), a `line`, or the whole `file`.
    """
    for number, lines in _READERS[source.unit or "paragraph"](lines_of(path)):
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
    """Yield runs of lines that are not blank, each with the number of its first line."""
    first, lines = 0, list[bytes]()
    for number, line in enumerate(file, start=1):
        if line.strip():
            first = first if lines else number
            lines.append(line)
        elif lines:
            yield first, b"".join(lines)
            lines = []
    if lines:
        yield first, b"".join(lines)


def _lines(file: Iterator[bytes]) -> Units:
    yield from enumerate(file, start=1)


def _whole(file: Iterator[bytes]) -> Units:
    yield 1, b"".join(file)


_READERS: dict[str, Callable[[Iterator[bytes]], Units]] = {"paragraph": _paragraphs, "line": _lines, "file": _whole}
UNITS = tuple(_READERS)
