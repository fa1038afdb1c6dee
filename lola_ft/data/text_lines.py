"""Lines of a text file as UTF-8, whatever its encoding and compression; the same for every kind of text file."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from lola_ft.errors import DataError, first_line
from lola_ft.row_formats import COMPRESSED

_UTF8_MARK = b"\xef\xbb\xbf"
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),  # before UTF-16, whose mark it begins with
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield a file's lines as UTF-8 bytes, without the mark that an editor may have put in front of the first.

    A line ends with a newline byte only, so that U+2028 may stand in a text. Bytes of a file that is taken for UTF-8
    come as they are.

    Raises:
        DataError: A file that cannot be unpacked, or one that begins as UTF-16 and is something else.
    """
    try:
        with _unpacked(path) as file:
            encoding = _encoding(file.peek(4)[:4])
            if encoding == "utf-8":
                for number, line in enumerate(file):
                    yield line if number else line.removeprefix(_UTF8_MARK)
            else:
                yield from (line.encode() for line in io.TextIOWrapper(file, encoding, newline="\n"))
    except UnicodeError as error:
        raise DataError(f"{path}: begins as {encoding.upper()} and is not ({error}). Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}.") from None


def decode(data: bytes, where: str) -> str:
    """Decode UTF-8 text, or raise a DataError that says which byte is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text (byte {error.start + 1} is 0x{data[error.start]:02x}). Save the file as UTF-8."
        ) from None


def _unpacked(path: Path) -> io.BufferedReader:
    compression = COMPRESSED.get(path.suffix.lower())
    if compression is None or path.stat().st_size == 0:
        return path.open("rb")
    import pyarrow

    packed: Any = pyarrow.CompressedInputStream(str(path), compression)
    return io.BufferedReader(cast(IO[bytes], packed))  # type: ignore[arg-type]


def _encoding(start: bytes) -> str:
    """Tell a file's encoding by its first four bytes: a mark, or the zeros that UTF-16 has beside Latin letters."""
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding
    zeros = [byte == 0 for byte in start]
    if len(start) == 4 and zeros in ([False, True] * 2, [True, False] * 2):
        return "utf-16-le" if zeros[1] else "utf-16-be"
    return "utf-8"
