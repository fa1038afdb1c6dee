"""Lines of a text file as UTF-8, whatever its encoding and compression; the same for every kind of text file."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lola_ft.errors import DataError, first_line
from lola_ft.row_formats import kind_of_file

_START = 65_536
"""Bytes from which the kind of a file is told."""
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_UTF8_MARK = b"\xef\xbb\xbf"
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),  # before UTF-16, whose mark it begins with
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield a file's lines as UTF-8 bytes, without the mark that an editor may have put in front of the first.

    A line ends with a newline byte, so that U+2028 may stand in a text; in a file without any, with a carriage return.
    Bytes of a file that is taken for UTF-8 come as they are.

    Raises:
        DataError: A file that is no text, cannot be unpacked, or begins as UTF-16 and goes on otherwise.
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
        raise DataError(f"{path}: begins as {encoding.upper()} and is not ({error}). Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}.") from None


def refuse_other_content(path: Path, start: bytes) -> None:
    """Refuse a file that begins as what it cannot be by its name, and say what it is."""
    for beginning, what in _OTHER_CONTENT.items():
        if start[: len(beginning)].lower() == beginning.lower() and kind_of_file(str(path)) != ".txt":
            raise DataError(f"{path}: {what}")


_OTHER_CONTENT = {
    b"PK\x03\x04": "a zip archive, as spreadsheets are, too. Unpack it, or save the sheet as .csv.",
    b"PAR1": "a Parquet file by its content. Name it .parquet.",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself. Fetch that with `git lfs pull`.",
    b"<!doctype html": "a web page, not data. Download the file itself.",
    b"<html": "a web page, not data. Download the file itself.",
}


def decode(data: bytes, where: str) -> str:
    """Decode UTF-8 text, or raise a DataError that says which byte is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text (byte {error.start + 1} is 0x{data[error.start]:02x}). Save the file as UTF-8."
        ) from None


def _unpacked(path: Path) -> "io.BufferedReader[Any]":
    """Open a file, and unpack what its first bytes say is packed, whatever its name."""
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
    """Tell a file's encoding by its first four bytes: a mark, or the zeros that UTF-16 has beside Latin letters."""
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding
    zeros = [byte == 0 for byte in start]
    if len(start) == 4 and zeros in ([False, True] * 2, [True, False] * 2):
        return "utf-16-le" if zeros[1] else "utf-16-be"
    return "utf-8"
