"""Lines of a text file as UTF-8, from any supported encoding and compression. All readers of text files use this."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lola_ft.errors import DataError, first_line
from lola_ft.row_formats import kind_of_file

_START = 65_536
"""Number of bytes that are read to recognise the kind of a file."""
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_UTF8_MARK = b"\xef\xbb\xbf"
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),  # tested before UTF-16, because it begins with UTF-16's mark
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield a file's lines as UTF-8 bytes, without a byte order mark at the beginning.

    A line ends with a newline byte, so that a text may contain U+2028. In a file without newlines, a line ends with a
    carriage return. The bytes of a UTF-8 file are not checked or changed.

    Raises:
        DataError: The file is not text, cannot be unpacked, or begins as UTF-16 and is not.
    """
    try:
        with _unpacked(path) as file:
            start = file.peek(_START)
            refuse_other_content(path, start)
            encoding = _encoding(start[:4])
            if encoding != "utf-8":
                yield from (line.encode() for line in io.TextIOWrapper(file, encoding, newline="\n"))
                return
            lines: Iterable[bytes] = file
            if b"\r" in start and b"\n" not in start:
                content = file.read()
                lines = io.BytesIO(content if b"\n" in content else content.replace(b"\r", b"\n"))
            for number, line in enumerate(lines):
                yield line if number else line.removeprefix(_UTF8_MARK)
    except UnicodeError as error:
        raise DataError(f"{path}: begins like {encoding.upper()} but is not ({error}). Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}.") from None


def refuse_other_content(path: Path, start: bytes) -> None:
    """Raise DataError if a file's first bytes show another kind of file than its name says."""
    for beginning, what in _OTHER_CONTENT.items():
        if start[: len(beginning)].lower() == beginning.lower() and kind_of_file(str(path)) != ".txt":
            raise DataError(f"{path}: {what}")


_OTHER_CONTENT = {
    b"PK\x03\x04": "is a zip archive or a spreadsheet. Unpack it, or save the sheet as .csv.",
    b"PAR1": "is a Parquet file by its content. Name it .parquet.",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself. Fetch the file with `git lfs pull`.",
    b"<!doctype html": "is a web page, not data. Download the file itself.",
    b"<html": "is a web page, not data. Download the file itself.",
}


def decode(data: bytes, where: str) -> str:
    """Decode UTF-8 text; raises a DataError that names the first byte that is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text (byte {error.start + 1} is 0x{data[error.start]:02x}). Save the file as UTF-8."
        ) from None


def _unpacked(path: Path) -> "io.BufferedReader[Any]":
    """Open a file, unpacking it if its first bytes show a compression; the name does not matter."""
    file = io.BufferedReader(io.FileIO(path), _START)
    start = file.peek(4)
    compression = next((name for mark, name in _PACKED.items() if start.startswith(mark)), None)
    if compression is None:
        return file
    import pyarrow

    file.close()
    packed: Any = pyarrow.CompressedInputStream(str(path), compression)
    return io.BufferedReader(packed, _START)


def _encoding(start: bytes) -> str:
    """Return a file's encoding from its first four bytes: a mark, or the zero bytes of Latin letters in UTF-16."""
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding
    zeros = [byte == 0 for byte in start]
    if len(start) == 4 and zeros in ([False, True] * 2, [True, False] * 2):
        return "utf-16-le" if zeros[1] else "utf-16-be"
    return "utf-8"
