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
    """Return the rows of a source, as `scan_rows` does; the first that cannot be read raises DataError."""
    return map(_usable, scan_rows(source))


def scan_rows(source: Source) -> Rows:
    """The rows of a source, good and bad; what is missing altogether is found before the first one.

    Raises:
        DataError: No such file, an unknown kind of file, a file broken as a whole, or no rows at all.
    """
    rows = hub_rows(source) if source.path is None else _rows_of(files_of(source.path), source.unit or "paragraph")
    return islice(_at_least_one(rows, source.name), source.limit)


def files_of(path: str) -> list[Path]:
    """Return the files that a path stands for, sorted by name; all can be opened and are of a known kind."""
    place = Path(path)
    try:
        folder = place.is_dir()
        pattern = not folder and glob.has_magic(path) and not place.exists()
    except (OSError, ValueError):  # a name too long, or with a zero byte: opening it says so
        folder = pattern = False
    if folder:
        nothing = f"{path}: the folder holds no {KINDS.replace(' and ', ' or ')} file."
        return _matching(f"{glob.escape(path)}/**", nothing)
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
        similar = similar_file(path)
        hint = f" Did you mean '{similar}'?" if similar else ""
        hint = hint if path.parent.is_dir() else f" There is no folder '{path.parent}' either."
        raise DataError(f"{path}: no such file.{hint}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None


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
