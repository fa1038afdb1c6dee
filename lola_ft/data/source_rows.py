"""Rows of a source: of local files, folders and globs, or of a dataset on the Hub. Every row knows its place."""

import glob
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from lola_ft.data.hub_rows import hub_rows
from lola_ft.data.json_files import json_rows, jsonl_rows
from lola_ft.data.rows import BadRow, Row, Rows, Source
from lola_ft.data.table_files import csv_rows, parquet_rows, tsv_rows
from lola_ft.data.text_files import text_rows
from lola_ft.errors import DataError
from lola_ft.files import similar_file

_READERS = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".parquet": parquet_rows,
    ".txt": text_rows,
}
KINDS = f"{', '.join(list(_READERS)[:-1])} and {list(_READERS)[-1]}"


def read_rows(source: Source) -> Iterator[Row]:
    """The rows of a source, one after the other.

    Raises:
        DataError: As `scan_rows`, and from the first row that cannot be read.
    """
    return map(_usable, scan_rows(source))


def scan_rows(source: Source) -> Rows:
    """The rows of a source, good and bad; what is missing altogether is found before the first one.

    Raises:
        DataError: No such file, an unknown kind of file, a file broken as a whole, or no rows at all.
    """
    rows = hub_rows(source) if source.path is None else _rows_of(files_of(source.path), source.unit or "paragraph")
    return islice(_at_least_one(rows, source.name), source.limit)


def files_of(path: str) -> list[Path]:
    """The files that a path stands for, sorted by name.

    Raises:
        DataError: None, one that cannot be opened, or one of an unknown kind.
    """
    place = Path(path)
    try:
        folder = place.is_dir()
        pattern = not folder and glob.has_magic(path) and not place.exists()
    except (OSError, ValueError):  # a name too long, or with a zero byte: opening it says so
        folder = pattern = False
    if folder:
        return _matching(
            f"{glob.escape(path)}/**", f"{path}: the folder holds no {KINDS.replace(' and ', ' or ')} file."
        )
    if pattern:
        return _matching(path, f"{path}: no file of a kind that can be read matches ({KINDS}).")
    _check_opens(place)
    if place.suffix.lower() not in _READERS:
        raise DataError(f"{path}: unknown kind of file '{place.suffix}'. This version reads {KINDS}.")
    return [place]


def _matching(pattern: str, nothing: str) -> list[Path]:
    """Files of known kinds, sorted; wildcards match no hidden file or folder."""
    found = (Path(name) for name in glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob finds hidden ones
    files = sorted(file for file in found if file.suffix.lower() in _READERS and file.is_file())
    if not files:
        raise DataError(nothing)
    for file in files:
        if any("\ud800" <= char <= "\udfff" for char in str(file)):  # how Python shows a byte that is no text
            raise DataError(f"{file}: the name of the file or its folder is not UTF-8. Rename it.")
    return files


def _check_opens(path: Path) -> None:
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.{_near(path)}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _near(path: Path) -> str:
    """Name the file of the same folder that was probably meant, or the folder that is missing too."""
    if not path.parent.is_dir():
        return f" There is no folder '{path.parent}' either."
    similar = similar_file(path)
    return f" Did you mean '{similar}'?" if similar else ""


def _rows_of(files: list[Path], unit: str) -> Rows:
    for file in files:
        kind = file.suffix.lower()
        yield from text_rows(file, unit) if kind == ".txt" else _READERS[kind](file)


def _at_least_one(rows: Iterable[Row | BadRow], name: str) -> Rows:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{name} holds no rows. Give a file with at least one, or remove this source.")


def _usable(row: Row | BadRow) -> Row:
    if isinstance(row, BadRow):
        raise DataError(row.message)
    return row
